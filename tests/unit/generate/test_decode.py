"""The three ways to make a token beside the greedy loop of transformers: the same ids on every architecture."""

from __future__ import annotations

import gc
import logging
import weakref
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.errors import InputError
from fourbit.generate import Sampling
from fourbit.generate import decode as module
from fourbit.generate.cache import Room, make_cache
from fourbit.generate.decode import decode
from fourbit.generate.walk import Walk
from fourbit.models.prepare import fuse_modules

VOCABULARY = 300
GATED = {"intermediate_size": 64}
GROUPED = {**GATED, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 6}

LLAMAS = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": None},
    "Qwen2": GROUPED,
    "Qwen3": {**GROUPED, "head_dim": 8},
    "Gemma": {**GROUPED, "head_dim": 8},
}
"""Models of LLaMA's build, with the differences there are: biases, norms of heads, another activation and norm."""

OTHERS = {
    "GPT2": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "GPTNeoX": GATED,
    "Phi": GATED,
    "Phi3": GROUPED,
    "Gemma2": {**GROUPED, **WINDOW, "head_dim": 8},
    "Gemma3Text": {**GROUPED, **WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "Mistral": {**GROUPED, **WINDOW},
}
"""Models of other builds, or with windows that the prompts are longer than."""


def tiny(name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights that are large enough to tell tokens apart."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **shape | settings,
    )  # fmt: skip
    torch.manual_seed(1)
    kind = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, kind)(config).to(dtype).eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def run(model: Any, given: list[list[int]], most: int = 12, settings: Sampling | None = None) -> list[list[int]]:
    """The tokens of each row."""
    keys = [str(row) for row in range(len(given))]
    made = decode(model, given, settings=settings or Sampling(), keys=keys, most=most, tokenizer=None)  # type: ignore[arg-type]
    return [list(row) for row in zip(*made, strict=True)]


def of_transformers(model: Any, given: list[list[int]], most: int = 12) -> list[list[int]]:
    """The same by its own greedy loop, which does not stop at an end either."""
    width = max(map(len, given))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in given])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in given])
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=0,
        eos_token_id=VOCABULARY + 1,
    )  # fmt: skip
    return made[:, width:].tolist()  # type: ignore[no-any-return]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of step that were gone on with after the first."""
    kinds: list[str] = []

    def noting(model: Any, candidate: Any, plain: Any, *, tolerance: float) -> Any:
        step = own(model, candidate, plain, tolerance=tolerance)

        def note(text: Tensor) -> Tensor:
            logits = step(text)
            kinds.append(type(getattr(step, "_step", step)).__name__)
            return logits

        return note

    own = module.proven
    monkeypatch.setattr(module, "proven", noting)
    return kinds


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that a GPU captures, called here as it is."""
    monkeypatch.setattr(module, "_captures", lambda device: True)


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 1)], ids=["alone", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True], ids=["own", "fused"])
@pytest.mark.parametrize("name", LLAMAS)
def test_a_walk(name: str, fused: bool, dtype: torch.dtype, lengths: tuple[int, ...], taken: list[str]) -> None:
    model = tiny(name, LLAMAS[name], dtype)
    if fused:
        fuse_modules(model)
    given = prompts(*lengths)
    assert run(model, given) == of_transformers(model, given)
    assert taken == ["Walk"] * 11


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 1)], ids=["alone", "padded"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_plain_step(name: str, lengths: tuple[int, ...], taken: list[str]) -> None:
    model, given = tiny(name, OTHERS[name]), prompts(*lengths)
    assert run(model, given, 20) == of_transformers(model, given, 20)
    assert not taken


@pytest.mark.parametrize("lengths", [(9,), (9, 4, 1)], ids=["alone", "padded"])
@pytest.mark.parametrize(("name", "settings"), [*LLAMAS.items(), *OTHERS.items()])
def test_a_step_that_can_be_captured(
    name: str, settings: dict[str, Any], lengths: tuple[int, ...], captures: None, taken: list[str]
) -> None:
    model, given = tiny(name, settings), prompts(*lengths)
    assert run(model, given, 20) == of_transformers(model, given, 20)
    assert taken == ["Captured"] * 19


def test_a_captured_step_asks_the_host_for_nothing(captures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would make a stream wait, or differ from token to token, cannot be captured."""
    seen: list[list[str]] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            shapes = [tuple(each.shape) for each in args if isinstance(each, Tensor)]
            seen[-1].append(f"{func} {shapes}")
            return func(*args, **kwargs or {})

    own = module.Captured._run

    def watched(self: Any) -> None:
        seen.append([])
        with Calls():
            own(self)

    monkeypatch.setattr(module.Captured, "_run", watched)
    for name in ("Llama", "Gemma2"):
        seen.clear()
        run(tiny(name, {**LLAMAS, **OTHERS}[name]), prompts(9, 4), 9)
        assert len(seen) == 8
        assert all(calls == seen[0] for calls in seen)
        assert not [call for call in seen[0] if "_local_scalar_dense" in call or "nonzero" in call]


@pytest.mark.parametrize(
    "settings", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)], ids=["greedy", "drawn"]
)
def test_all_ways_agree(settings: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny("Llama", GROUPED), prompts(9, 4)
    walk = run(model, given, 40, settings)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_captures", lambda device: True)
        assert run(model, given, 40, settings) == walk
    monkeypatch.setattr(module, "_choose_step", lambda model, outputs, inputs, _: module._Plain(model, outputs, inputs))
    assert run(model, given, 40, settings) == walk


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_batches_of_a_real_model(stories_model: Path, rows: int, taken: list[str]) -> None:
    model = fourbit.load(stories_model, dtype=torch.float32).eval()
    given = prompts(*(3 + row % 7 for row in range(rows)))
    assert run(model, given, 30) == of_transformers(model, given, 30)
    assert taken == ["Walk"] * 29


@pytest.mark.parametrize("active", [True, False])
def test_with_an_adapter(stories_model: Path, active: bool, taken: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(fourbit.load(stories_model, dtype=torch.float32), config).eval()
    given = prompts(8, 3)
    plain = run(model.get_base_model(), given)
    if active:
        assert run(model, given) == of_transformers(model, given) == plain
    else:
        with model.disable_adapter():
            assert run(model, given) == of_transformers(model, given) != plain
    assert set(taken) == {"Walk"}


def test_what_somebody_watches_is_called(taken: list[str]) -> None:
    model, given, calls = tiny("Llama", GROUPED), prompts(9), list[int]()
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    expected = of_transformers(model, given)
    calls.clear()
    assert run(model, given) == expected
    assert len(calls) == 12
    handle.remove()
    assert not taken


def test_a_walk_that_goes_wrong_is_not_taken(caplog: pytest.LogCaptureFixture, taken: list[str]) -> None:
    """Granite has LLaMA's build, and multiplies what a layer adds."""
    model = tiny("Granite", {**GROUPED, "residual_multiplier": 0.5})
    with caplog.at_level(logging.WARNING, "fourbit"):
        assert run(model, prompts(9)) == of_transformers(model, prompts(9))
    assert "Walk gives other scores" in caplog.text
    assert set(taken) == {"_Plain"}


def test_a_proof_is_made_once(taken: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, trials = tiny("Llama", GROUPED), list[int]()
    own = Walk.trial
    monkeypatch.setattr(Walk, "trial", lambda self, text: trials.append(1) or own(self, text))
    first = run(model, prompts(9))
    assert run(model, prompts(9)) == first
    assert len(trials) == 1
    assert taken == ["Walk"] * 22


def test_a_model_that_keeps_something_else(taken: list[str]) -> None:
    """A state-space model has no keys and values of tokens; it decodes with transformers' own cache."""
    model = tiny("Mamba", {"state_size": 4, "num_attention_heads": 1})
    assert make_cache(model, 30) is None
    assert run(model, prompts(9)) == of_transformers(model, prompts(9))
    assert not taken


def test_the_cache_goes_with_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[weakref.ref[Any]] = []

    def noting(*arguments: Any, **others: Any) -> Any:
        cache = make_cache(*arguments, **others)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(module, "make_cache", noting)
    model = tiny("Llama", GROUPED)
    given = prompts(9)
    with closing(decode(model, given, settings=Sampling(), keys=["0"], most=30, tokenizer=None)) as made:  # type: ignore[arg-type]
        assert len(list(islice(made, 4))) == 4
        assert caches[0]() is not None
    del made
    gc.collect()
    assert caches[0]() is None


def test_scores_that_are_not_numbers_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("Llama", GROUPED)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(InputError, match="not numbers"):
        run(model, prompts(9))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("capacity", [1, 8, 40])
@pytest.mark.parametrize("steps", [(1,) * 30, (7, 1, 1, 1, 1, 1, 1, 1, 1), (12, 4, 1, 3, 9, 1)])
def test_a_room_shows_what_transformers_cache_shows(capacity: int, window: int | None, steps: tuple[int, ...]) -> None:
    """Also beyond the capacity that it was told."""
    if window is None:
        own: Any = transformers.cache_utils.DynamicLayer()
    else:
        own = transformers.cache_utils.DynamicSlidingWindowLayer(window)
    room = Room(capacity, window)
    if window == 1:
        steps = steps[:1]  # transformers keeps all of it then: -1 + 1 is 0
    for number, new in enumerate(steps):
        keys, values = torch.randn(2, 3, new, 4), torch.randn(2, 3, new, 6)
        assert room.get_mask_sizes(new) == own.get_mask_sizes(new)
        expected, found = own.update(keys, values), room.update(keys, values)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), number
        assert room.get_seq_length() == sum(steps[: number + 1])


def test_a_token_can_be_taken_back() -> None:
    room = Room(10)
    first, wrong, right = (torch.randn(1, 2, 1, 4) for _ in range(3))
    room.update(first, first)
    room.update(wrong, wrong)
    room.take_back(1)
    keys, _ = room.update(right, right)
    assert torch.equal(keys, torch.cat((first, right), dim=2))


def test_what_cannot_be_captured_is_said(
    captures: None, taken: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module.Captured, "capture", fail)
    model = tiny("Llama", GROUPED)
    with caplog.at_level(logging.WARNING, "fourbit"):
        assert run(model, prompts(9)) == of_transformers(model, prompts(9))
    assert "itself: operation not permitted when stream is capturing" in caplog.text
    assert not taken


def test_few_tokens_are_not_worth_a_graph(captures: None, taken: list[str]) -> None:
    model = tiny("Llama", GROUPED)
    assert run(model, prompts(9), 3) == of_transformers(model, prompts(9), 3)
    assert not taken
