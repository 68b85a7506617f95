"""Our attention inside of models of transformers: the same numbers as sdpa, whatever masks a model makes.

A model in fp32 with our attention must be as close to the same model in fp64 with torch's as it is with torch's in
fp32; both err by accumulated rounding alone, and a factor of 4 covers the other order of sums.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fourbit.kernels import ops
from fourbit.kernels.native import unavailable
from fourbit.nn.attention import FusedAttention, FusedRotaryAttention, uses_attention_functions, why_not_attention
from fourbit.nn.fused import fuse
from fourbit.nn.rotary import prove_rotary, rotary_function

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"native: {unavailable()}")

TOKENS = 24
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "max_position_embeddings": 64},
}


def model_of(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **MODELS.get(kind, {}), **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def with_ours(model: nn.Module) -> Any:
    """A copy that attends by `ops.attention` wherever it can."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if uses_attention_functions(module) and why_not_attention(module) is None:
            function = rotary_function(module)
            rotates = function is not None and prove_rotary(function) is None
            fuse(module, FusedRotaryAttention if rotates else FusedAttention, None)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of our attention was a causal one."""
    seen: list[bool] = []
    own = ops.attention

    def counted(*args: Any, causal: bool, **kwargs: Any) -> Tensor:
        seen.append(causal)
        return own(*args, causal=causal, **kwargs)

    monkeypatch.setattr(ops, "attention", counted)
    return seen


def ids() -> Tensor:
    return torch.randint(2, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def plain() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def padded(side: str) -> dict[str, Tensor]:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def packed() -> dict[str, Tensor]:
    """Three documents in a row."""
    positions = torch.cat([torch.arange(5), torch.arange(12), torch.arange(TOKENS - 17)])
    return {"input_ids": ids(), "position_ids": positions.expand(2, -1)}


INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "plain": plain,
    "left padding": lambda: padded("left"),
    "right padding": lambda: padded("right"),
    "packed": packed,
}


def results(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The logits of visible tokens, and the gradient of their loss in every parameter."""
    model.zero_grad()
    visible = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = model(**batch, use_cache=False).logits[visible]
    nn.functional.cross_entropy(logits, batch["input_ids"][visible]).backward()
    return [logits.detach(), *(x.grad for x in model.parameters() if x.grad is not None)]


def distance(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [(x.double() - y).norm().item() for x, y in zip(found, truth, strict=True)]


# Learned positions know no packed sequences.
@pytest.mark.parametrize(
    ("kind", "inputs"), [(k, i) for k in MODELS for i in INPUTS if i != "packed" or k not in ("gpt2", "opt")]
)
def test_as_close_to_fp64_as_sdpa(kind: str, inputs: str, calls: list[bool]) -> None:
    model, batch = model_of(kind), INPUTS[inputs]()
    truth = results(copy.deepcopy(model).double(), batch)
    theirs = distance(results(model, batch), truth)
    ours = distance(results(with_ours(model), batch), truth)
    assert len(calls) == 2
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine <= 4 * other + 1e-6 * exact.norm().item() + 1e-9


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_bf16_is_as_close_to_fp64_as_sdpa(kind: str) -> None:
    model, batch = model_of(kind).bfloat16(), plain()
    truth = results(copy.deepcopy(model).double(), batch)
    theirs, ours = distance(results(model, batch), truth), distance(results(with_ours(model), batch), truth)
    assert all(mine <= 2 * other for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_generation(kind: str, cache: str, calls: list[bool]) -> None:
    """Greedy, with a cache, from padded prompts: the same tokens, and scores as close as above."""
    model, batch = model_of(kind), padded("left")
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": cache,
        "disable_compile": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    truth = copy.deepcopy(model).double().generate(**batch, **options)
    theirs, ours = model.generate(**batch, **options), with_ours(model).generate(**batch, **options)
    assert len(calls) == 2 * 12
    assert torch.equal(ours.sequences, truth.sequences)
    wanted = list(truth.logits)
    for mine, other in zip(distance(ours.logits, wanted), distance(theirs.logits, wanted), strict=True):
        assert mine <= 4 * other + 1e-6


def test_a_plain_batch_needs_no_mask(calls: list[bool]) -> None:
    with_ours(model_of("llama"))(**plain())
    assert calls == [True, True]


def test_prefill_of_a_static_cache_is_causal(calls: list[bool]) -> None:
    model = model_of("llama")
    batch = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(with_ours(model).generate(ids(), **batch), model.generate(ids(), **batch))
    assert calls == [True, True, False, False, False, False]


def test_what_we_do_not_take_goes_to_sdpa(calls: list[bool]) -> None:
    model = with_ours(model_of("llama", attention_dropout=0.5))
    torch.manual_seed(0)
    model.train()(**plain())
    assert calls == []
    model.eval().double()(**plain())
    assert calls == []


def test_models_that_attend_in_another_way_are_left() -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    reasons = {why_not_attention(module) for module in model.modules() if uses_attention_functions(module)}
    assert reasons == {"the model is set to eager attention, and only sdpa is replaced"}


def test_the_user_can_still_choose_another(calls: list[bool]) -> None:
    model = with_ours(model_of("llama"))
    mine = model(**plain()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**plain()).logits, mine, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_another_model_of_the_architecture_is_not_touched(calls: list[bool]) -> None:
    model = model_of("llama")
    with_ours(model)
    model(**plain())
    assert calls == []


def test_copies_and_pickles_attend_as_the_model_does(calls: list[bool]) -> None:
    model = with_ours(model_of("llama"))
    expected = model(**plain()).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(again(**plain()).logits, expected)
        assert len(calls) == 2


def test_compiles_in_one_graph() -> None:
    model = with_ours(model_of("llama"))
    expected = model(**plain()).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**plain()).logits, expected, rtol=1e-5, atol=1e-6)
