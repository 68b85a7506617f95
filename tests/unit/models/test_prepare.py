"""A prepared model computes what it computed before, and is otherwise the same model.

How close is close: rounding apart, both compute the same function, so the distance of the prepared model from the
unprepared one in fp64 may be a few times that of the unprepared one in the dtype itself, and no more. FACTOR is that,
for another order of sums and, in the backward pass, other places of rounding.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import fourbit
from fourbit.errors import InputError
from fourbit.kernels.native import library
from fourbit.nn.fused import is_fused
from fourbit.nn.loss import FusedLoss, LazyLogits, causal_lm_loss
from fourbit.nn.offload import HostLane, OffloadedCheckpoint

FACTOR = 3
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 5},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {},
    "gpt_neox": {"rotary_pct": 0.25},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
    "glm4": {},
    "mixtral": {"num_local_experts": 3, "output_router_logits": True, "experts_implementation": "eager"},
}

# peft asks a model of the newest transformers in the old way
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def build(kind: str = "llama", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **NO_DROPOUT, **MODELS.get(kind, {}), **settings})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():  # initialised as they are, norms and biases would hide what is done with them
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape).to(dtype))
    return model.train()


def batch(masked: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if masked:
        labels[0, :4] = labels[1, -1] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: Any, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    loss = model(**(inputs or batch())).loss
    loss.backward()
    return [loss.detach(), *(p.grad.detach().clone() for p in model.parameters() if p.grad is not None)]


def unprepared(model: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(dtype)


def assert_as_close(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], eps: float) -> None:
    """Ours is at most FACTOR times as far from the exact values as the plain model's are, with a floor of `eps`.

    Gradients that are zero but for rounding (a key's bias) are measured against the largest one.
    """
    largest = max(x.norm() for x in exact)
    assert len(ours) == len(plain) == len(exact)
    for a, b, c in zip(ours, plain, exact, strict=True):
        scale = c.norm() + 1e-3 * largest
        assert (a.double() - c).norm() <= FACTOR * (b.double() - c).norm() + eps * scale


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_the_models_own(kind: str, dtype: torch.dtype) -> None:
    model = build(kind, dtype)
    exact = loss_and_gradients(unprepared(model, torch.float64))
    plain = loss_and_gradients(unprepared(model, dtype))
    fourbit.prepare(model, gradient_checkpointing=False)
    model.requires_grad_(True)
    ours = loss_and_gradients(model)
    assert_as_close(ours, plain, exact, 4 * torch.finfo(dtype).eps)
    assert model.fourbit_prepared.taken["loss"] == 1


def test_what_is_taken() -> None:
    report = fourbit.prepare(build("llama")).fourbit_prepared
    assert report.taken == {"LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5, "loss": 1}
    assert report.left == {}
    assert report.checkpointing
    again = build("gpt_neox")
    assert "GPTNeoXAttention" in str(fourbit.prepare(again, gradient_checkpointing=False).fourbit_prepared)


def test_preparing_twice_changes_nothing() -> None:
    model = fourbit.prepare(build("llama"))
    before = [type(module) for module in model.modules()], model.fourbit_prepared, model.loss_function
    fourbit.prepare(model)
    assert ([type(module) for module in model.modules()], model.fourbit_prepared, model.loss_function) == before


def test_another_model_of_the_process_is_as_it_was() -> None:
    plain = loss_and_gradients(build("llama"))
    fourbit.prepare(build("llama"))
    other = build("llama")
    assert not any(is_fused(module) for module in other.modules())
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(other), plain, strict=True))


def test_a_training_step_gives_no_logits_and_evaluation_does() -> None:
    model = build("llama")
    own = model.eval()(**batch()).logits
    fourbit.prepare(model)
    out = model.train()(**batch())
    assert out.logits is None
    assert "logits" not in out.keys()  # noqa: SIM118  # an output's own idea of what it holds
    assert len(model(**batch(), return_dict=False)) == 1
    assert model(input_ids=batch()["input_ids"]).logits.shape == (2, 9, VOCABULARY)
    evaluated = model.eval()(**batch())
    assert isinstance(evaluated.loss, Tensor)
    # 2 layers of about 10 operations on numbers of size 1, each in fp32
    assert (evaluated.logits - own).abs().max() <= 64 * torch.finfo(torch.float32).eps * own.abs().max()


def test_another_thread_gets_logits_while_one_trains() -> None:
    model = fourbit.prepare(build("llama"), gradient_checkpointing=False)
    own, found = model.lm_head.forward, []

    def ask_meanwhile(*args: Any) -> Any:
        del model.lm_head.forward
        asking = threading.Thread(target=lambda: found.append(model(input_ids=batch()["input_ids"]).logits))
        asking.start()
        asking.join()
        return own(*args)

    model.lm_head.forward = ask_meanwhile
    assert model(**batch()).logits is None
    assert isinstance(found[0], Tensor)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [False, True])
def test_what_the_sum_is_divided_by(masked: bool, items: Tensor | int | None, shifted: bool) -> None:
    model = build("llama")
    arguments: dict[str, Any] = {**batch(masked), "num_items_in_batch": items}
    if shifted:
        arguments["shift_labels"] = arguments["labels"].flip(0)
    expected = unprepared(model, torch.float64)(**arguments).loss
    found = fourbit.prepare(model)(**arguments).loss
    assert found.dtype == torch.float32
    assert abs(found.item() - expected.item()) <= 1e-6 * abs(expected.item())


def test_no_label_counts() -> None:
    model = fourbit.prepare(build("llama"))
    ids = batch()["input_ids"]
    assert model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.isnan()  # as transformers' own
    assert model(input_ids=ids, labels=torch.full_like(ids, -100), num_items_in_batch=3).loss == 0


def test_a_label_outside_of_the_vocabulary() -> None:
    model = fourbit.prepare(build("llama"))
    inputs = batch()
    inputs["labels"][0, 5] = VOCABULARY
    with pytest.raises(IndexError, match="vocabulary"):
        model(**inputs)
    assert model(**batch()).logits is None  # and the next step works


# ---- adapters ----


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )


def adapted(model: Any, **settings: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(model, lora(**settings)).train()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters(order: str, checkpointing: bool, quantized: bool) -> None:
    base = build("llama")
    if quantized:
        fourbit.quantize_module(base, fourbit.QuantConfig(block_size=32), skip=["lm_head"])
    plain_model = adapted(copy.deepcopy(base))
    plain = loss_and_gradients(plain_model)
    if order == "before":
        model = adapted(fourbit.prepare(base, gradient_checkpointing=checkpointing))
    else:
        model = fourbit.prepare(adapted(base), gradient_checkpointing=checkpointing)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, parameter in plain_model.named_parameters() if parameter.requires_grad]
    ours = loss_and_gradients(model)
    assert model(**batch()).logits is None
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=["saved", "adapted"]
)
def test_a_head_that_is_trained(settings: dict[str, Any]) -> None:
    base = build("llama")
    with torch.random.fork_rng():
        plain_model = get_peft_model(copy.deepcopy(base), LoraConfig(**{**LORA, **settings})).train()
    plain = loss_and_gradients(plain_model)
    fourbit.prepare(base, gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(**{**LORA, **settings})).train()
    model.load_state_dict(plain_model.state_dict())
    for a, b in zip(loss_and_gradients(model), plain, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


LORA: dict[str, Any] = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def test_a_quantized_head() -> None:
    model = build("llama", tie_word_embeddings=False)
    fourbit.quantize_module(model, fourbit.QuantConfig(block_size=32))
    expected = model(**batch()).loss
    fourbit.prepare(model)
    assert model.fourbit_prepared.taken["loss"] == 1
    assert abs(model(**batch()).loss - expected) <= 1e-5 * expected


def test_evaluating_between_steps_changes_no_gradient() -> None:
    model = adapted(fourbit.prepare(build("llama", torch.bfloat16)))
    first = loss_and_gradients(model)
    model.eval()
    with torch.no_grad():
        model(**batch())
    model.generate(batch()["input_ids"], max_new_tokens=2, do_sample=False)
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(model), first, strict=True))


def test_autocast() -> None:
    model = build("llama")
    plain = unprepared(model, torch.float32)
    exact = unprepared(model, torch.float64)(**batch()).loss
    fourbit.prepare(model, gradient_checkpointing=False).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(**batch()).loss, model(**batch()).loss
    assert found.dtype == torch.float32
    assert abs(found - exact) <= FACTOR * abs(expected - exact) + 4 * torch.finfo(torch.bfloat16).eps
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- still the same model ----


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(way: Callable[[Any], Any]) -> None:
    model = fourbit.prepare(build("gemma2"), gradient_checkpointing=False)
    expected = model(**batch()).loss
    twin = way(model)
    assert twin(**batch()).logits is None
    assert twin(**batch()).loss == expected
    for ours, theirs in zip(model.modules(), twin.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert ours is not theirs
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    assert model(**batch()).loss == expected


def test_torch_save() -> None:
    model = fourbit.prepare(build("llama"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(**batch()).loss == model(**batch()).loss


def test_saved_folder(tmp_path: Path) -> None:
    model = build("qwen2")
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    fourbit.prepare(model)
    model.save_pretrained(tmp_path / "after")
    assert list(model.state_dict()) == names
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert configs[0] | {"use_cache": False} == configs[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert type(again).__name__ == "Qwen2ForCausalLM"
    assert not is_fused(again)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_state_dict_loads_either_way() -> None:
    model, prepared = build("llama"), fourbit.prepare(build("llama"))
    assert str(prepared.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    assert str(model.load_state_dict(prepared.state_dict())) == "<All keys matched successfully>"


def test_generation() -> None:
    model = build("llama").eval()
    prompt = batch()["input_ids"]
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    fourbit.prepare(model)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None), expected)
    assert not model.training


def test_signature_and_class() -> None:
    plain, model = build("llama"), fourbit.prepare(build("llama"))
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert isinstance(model, type(plain))
    assert str(model) == str(plain)


@pytest.mark.filterwarnings("ignore")
def test_compiled() -> None:
    torch.compiler.reset()
    model = fourbit.prepare(build("llama"), gradient_checkpointing=False).requires_grad_(True)
    expected = loss_and_gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    for a, b in zip(loss_and_gradients(compiled), expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    torch.compiler.reset()


def test_hidden_states_can_still_be_asked_for() -> None:
    model = fourbit.prepare(build("llama"))
    out = model(**batch(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert out.logits is None


# ---- frozen, checkpointed, without cache ----


def test_frozen_and_checkpointed() -> None:
    model = build("llama", torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.config.use_cache = True
    fourbit.prepare(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing
    assert not fourbit.prepare(build("llama"), gradient_checkpointing=False).is_gradient_checkpointing


def test_checkpointing_changes_no_bit() -> None:
    kept = adapted(fourbit.prepare(build("llama", torch.bfloat16), gradient_checkpointing=False))
    again = adapted(fourbit.prepare(build("llama", torch.bfloat16), gradient_checkpointing=True))
    pairs = zip(loss_and_gradients(kept), loss_and_gradients(again), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_offloading_changes_no_bit() -> None:
    kept = adapted(fourbit.prepare(build("llama", torch.bfloat16), gradient_checkpointing=True))
    moved = adapted(fourbit.prepare(build("llama", torch.bfloat16), gradient_checkpointing="offload"))
    assert "GPU" in moved.base_model.model.fourbit_prepared.left["offloading"]
    lanes = []
    for module in moved.modules():  # as on a GPU, with another place of this memory for the host's
        if own := module.__dict__.get("_gradient_checkpointing_func"):
            offloaded = OffloadedCheckpoint(own, least_bytes=1, lane=lambda device: lanes.append(1) or HostLane(device))
            module._gradient_checkpointing_func = offloaded
    pairs = zip(loss_and_gradients(kept), loss_and_gradients(moved), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert lanes


def test_a_way_of_checkpointing_that_there_is_not() -> None:
    with pytest.raises(InputError, match="'offload'"):
        fourbit.prepare(build("llama"), gradient_checkpointing="disk")


def test_training_flags_and_random_numbers_are_left_alone() -> None:
    model = build("llama", attention_dropout=0.1)
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    fourbit.prepare(model)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.rand(2), expected)


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(library, "keep_freed_memory", lambda: kept.append(True))
    model = fourbit.prepare(build("llama"), fused=False)
    assert not any(is_fused(module) for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(**batch()).logits is not None
    assert not kept  # it is set for the whole process
    fourbit.prepare(build("llama"))
    assert kept


def test_what_is_no_language_model() -> None:
    with pytest.raises(InputError, match="no model of transformers"):
        fourbit.prepare(nn.Linear(2, 2))
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    report = fourbit.prepare(AutoModelForSequenceClassification.from_config(config)).fourbit_prepared
    assert report.left == {"loss": "the model has no linear head over its vocabulary"}
    assert report.taken["LlamaMLP"] == 2


def test_a_model_that_cannot_checkpoint() -> None:
    model = build("llama")
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="gradient_checkpointing=False"):
        fourbit.prepare(model)
    assert not any(is_fused(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- what looks like a known module and is none ----


def test_a_norm_that_does_something_else_is_left() -> None:
    model = build("llama")
    own = type(model.model.norm)
    model.model.norm.__class__ = type(
        "OddRMSNorm", (own,), {"forward": lambda self, x: own.forward(self, x - x.mean())}
    )
    report = fourbit.prepare(model).fourbit_prepared
    assert report.left == {"OddRMSNorm": "its result is that of no formula known here"}
    assert report.taken["LlamaRMSNorm"] == 4


def test_an_mlp_that_does_something_else_is_left() -> None:
    model = build("llama")
    own = type(model.model.layers[0].mlp)
    odd = type("OddMLP", (own,), {"forward": lambda self, x: own.forward(self, x).clamp(max=1)})
    model.model.layers[0].mlp.__class__ = odd
    report = fourbit.prepare(model).fourbit_prepared
    assert report.left == {"OddMLP": "its result is not act(gate) * up with an activation known here"}
    assert report.taken["LlamaMLP"] == 1


def test_interleaved_rotary_embeddings_are_left() -> None:
    report = fourbit.prepare(build("glm4")).fourbit_prepared
    assert report.left["Glm4Attention"] == "its result is not the rotation of halves"


def test_another_loss_is_left() -> None:
    model = build("llama")
    model.loss_function = own = lambda logits, labels, **_: logits.float().mean()
    report = fourbit.prepare(model).fourbit_prepared
    assert "loss function" in report.left["loss"]
    assert model.loss_function is own
    assert model(**batch()).logits is not None


def test_a_model_that_uses_its_logits_is_left_its_loss() -> None:
    model = build("llama")
    own = type(model)

    def forward(self: Any, **inputs: Any) -> Any:
        hidden = self.model(inputs["input_ids"]).last_hidden_state
        logits = self.lm_head(hidden) - 1
        return type("Out", (dict,), {"loss": self.loss_function(logits, inputs["labels"], VOCABULARY)})()

    model.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": __name__})
    report = fourbit.prepare(model).fourbit_prepared
    assert report.left["loss"] == "the model uses its logits for something else on their way to the loss"
    assert not isinstance(model.loss_function, FusedLoss)


# ---- the pieces ----


def test_lazy_logits_are_real_as_soon_as_they_are_used() -> None:
    head = nn.Linear(4, 7)
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x = head(hidden)

    def lazy() -> Any:
        return LazyLogits(head, hidden, head.forward)

    deferred: list[tuple[Any, Tensor]] = [
        (lazy() * 2, x * 2),
        (2.5 * lazy() / 2, x * 1.25),
        (torch.tanh(lazy() / 3.0) * 3.0, torch.tanh(x / 3) * 3),
        (lazy().float().contiguous(), x),
    ]
    for found, expected in deferred:
        assert found.pending
        assert torch.allclose(found.dense(), expected, rtol=1e-6, atol=1e-6)
        assert not found.pending
    real: list[tuple[Any, Tensor]] = [
        (lazy() + 1, x + 1),
        (1 - lazy(), 1 - x),
        (-lazy(), -x),
        (lazy()[:, 1:], x[:, 1:]),
        (torch.softmax(lazy(), -1), torch.softmax(x, -1)),
        (torch.cat([lazy(), lazy()]), torch.cat([x, x])),
        (lazy().view(-1, 7), x.view(-1, 7)),
        (lazy() * torch.full((7,), 2.0), 2 * x),
        (lazy() * -1, -x),
        (lazy() / torch.tensor(2.0), x / 2),
        ((torch.tanh(lazy()) * 2) * 3, torch.tanh(x) * 6),
        (torch.tanh(torch.tanh(lazy()) * 2), torch.tanh(torch.tanh(x) * 2)),
        (torch.tanh(lazy()) + 1, torch.tanh(x) + 1),
    ]
    for found, expected in real:
        assert isinstance(found, Tensor)
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    logits = lazy()
    assert logits.shape == x.shape
    logits[..., 0] = -torch.inf
    assert logits.dense()[0, 0, 0] == -torch.inf


def test_causal_lm_loss_by_itself() -> None:
    head = nn.Linear(4, VOCABULARY)
    hidden = torch.randn(2, 9, 4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    labels = batch()["labels"]
    loss = causal_lm_loss(hidden, head, labels, scale=2.0)
    loss.backward()
    twin = hidden.detach().clone().requires_grad_()
    expected = nn.functional.cross_entropy(2 * head(twin)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(hidden.grad, twin.grad, rtol=1e-4, atol=1e-7)
    with pytest.raises(TypeError, match="linear head"):
        causal_lm_loss(hidden, nn.Identity(), labels)
