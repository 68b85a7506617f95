"""All layers of a token in one native call: the same tokens as transformers', the same bits as kernel after kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fourbit
from fourbit.generate import walk as module
from fourbit.kernels import native
from fourbit.kernels.native import library
from fourbit.models.prepare import fuse_modules
from tests.unit.generate.test_decode import LLAMAS, of_transformers, prompts, run, tiny

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"no native kernels: {native.unavailable()}")

SIZES = {"small": {}, "blocks": {"hidden_size": 128, "intermediate_size": 192}}
"""Rows shorter than a block, and of whole blocks, which take another inner kernel."""

LENGTHS = {"alone": (9,), "padded": (9, 4, 1), "eight": (3, 4, 5, 6, 7, 8, 9, 2), "many": tuple(range(1, 11))}


@pytest.fixture(params=library.levels() if native.unavailable() is None else [])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = library.level()
    library.set_level(request.param)
    yield request.param
    library.set_level(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a walk came to: a native decoder, or why there is none."""
    found: list[str] = []
    own = module.native_decoder

    def noting(*arguments: Any) -> Any:
        try:
            made = own(*arguments)
        except ValueError as reason:
            found.append(str(reason))
            raise
        found.append("native")
        return made

    monkeypatch.setattr(module, "native_decoder", noting)
    return found


def quantized(name: str, dtype: torch.dtype, size: str = "small", *, adapter: bool = False) -> Any:
    model = tiny(name, {**LLAMAS[name], **SIZES[size]}, dtype)
    model = fourbit.quantize_module(model, fourbit.QuantConfig(), skip=("lm_head",))
    if adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    fuse_modules(model)
    return model.eval()


def slowly(model: Any, given: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The same by one kernel after the other."""

    def refuse(*_: object) -> Any:
        raise ValueError("asked for")

    with monkeypatch.context() as patch:
        patch.setattr(module, "native_decoder", refuse)
        return run(model, given)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "adapter"), [*((name, False) for name in LLAMAS), ("Llama", True), ("Qwen2", True)])
def test_tokens_are_those_of_transformers(
    name: str, adapter: bool, dtype: torch.dtype, lengths: tuple[int, ...], calls: list[str]
) -> None:
    model, given = quantized(name, dtype, adapter=adapter), prompts(*lengths)
    assert run(model, given) == of_transformers(model, given)
    assert calls == ["native"]


@pytest.mark.parametrize("adapter", [False, True], ids=["bare", "adapter"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_same_bits_at_every_level(
    level: str,
    dtype: torch.dtype,
    size: str,
    adapter: bool,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hidden states of tokens that are padded on the left, over several tokens of a filling cache."""
    model, given = quantized("Qwen3", dtype, size, adapter=adapter), prompts(9, 4, 1)
    states: list[Tensor] = []
    own = module.Walk.hidden

    def noting(self: module.Walk, text: Tensor) -> Tensor:
        states.append(own(self, text).clone())
        return states[-1]

    monkeypatch.setattr(module.Walk, "hidden", noting)
    tokens, fast = run(model, given), list(states)
    states.clear()
    assert slowly(model, given, monkeypatch) == tokens
    assert len(fast) >= len(states) > 10  # the first time it is proven, which makes no difference here
    assert all(torch.equal(a, b) for a, b in zip(fast[-11:], states[-11:], strict=True))
    assert calls == ["native"]


def test_threads_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = quantized("Llama", torch.bfloat16, "blocks"), prompts(9, 4)
    before = run(model, given)
    monkeypatch.setattr("fourbit.kernels.native.decoder.threads", lambda: 3)
    assert run(model, given) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.model.layers[1].mlp, "down_proj", torch.nn.Linear(64, 32)), "Linear"),
        (lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5), "more than weights"),
    ],
    ids=["in 16 bits", "differing"],
)
def test_what_it_does_not_take_goes_kernel_by_kernel(change: Any, reason: str, calls: list[str]) -> None:
    model = quantized("Llama", torch.float32)
    change(model)
    assert run(model, prompts(9)) == of_transformers(model, prompts(9))
    assert len(calls) == 1
    assert reason in calls[0]


def test_an_own_norm_goes_kernel_by_kernel(calls: list[str]) -> None:
    model = fourbit.quantize_module(tiny("Llama", LLAMAS["Llama"]), fourbit.QuantConfig(), skip=("lm_head",)).eval()
    assert run(model, prompts(9)) == of_transformers(model, prompts(9))
    assert calls == ["its attention is not ours"]
