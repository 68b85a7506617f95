"""What `prepare` takes on a GPU, and a training step on it: Triton's kernels from end to end, interpreted on the CPU.

Tensors stay on the CPU, where the interpreter takes them; `prepare` is told that they are on a GPU. Where torch sees a
GPU the kernels are compiled and cannot be interpreted: `tests/gpu` has the same there.

Both paths round in other places, so each is measured by its distance from the same step in fp64; see test_prepare.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fourbit
from fourbit.kernels import dispatch
from fourbit.kernels.triton import launch
from fourbit.models import prepare as preparing
from fourbit.nn import QuantLinear

FACTOR = 3
"""As far from the exact step as plain torch is, times this, for another order of sums and other places of rounding."""
STEPS, RATE = 2, 0.2
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
pytestmark = [
    pytest.mark.skipif(not launch.interpreted(), reason="Triton's kernels are not interpreted here"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft asks
]


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(preparing, "_device_of", lambda model: "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with dispatch.use("triton"):
        yield


def build(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    model = model.to(dtype)
    with dispatch.use("reference"):
        fourbit.quantize_module(model, fourbit.QuantConfig(block_size=32), skip=["lm_head"])
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, adapter).train()


def losses(model: Any) -> Tensor:
    """The losses of a few steps; only adapters are trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :2] = -100
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach().double())
    return torch.stack(found)


def exactly(model: Any) -> Any:
    """The same model with numbers in fp64, its 4-bit layers decoded."""
    exact = copy.deepcopy(model)
    for module in list(exact.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantLinear):
                dense = torch.nn.Linear(child.in_features, child.out_features, bias=False)
                dense.weight = torch.nn.Parameter(child.quantized.dequantize(torch.float32), requires_grad=False)
                setattr(module, name, dense)
    return exact.double()


def test_what_is_taken() -> None:
    model = build("llama", torch.bfloat16)
    report = fourbit.prepare(model).fourbit_prepared
    assert report.taken == {"LlamaAttention": 1, "LlamaMLP": 1, "LlamaRMSNorm": 3, "loss": 1}
    assert report.left == {"attention": "on cuda it runs on torch's flash or memory-efficient attention"}


def test_without_triton_the_modules_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch.Operation, "explain", lambda self, device: {"backend": "reference", "why": "no Triton here"}
    )
    report = fourbit.prepare(build("llama", torch.bfloat16)).fourbit_prepared
    assert report.taken == {"loss": 1}
    assert report.left == {"modules": "no Triton here"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_without_bfloat16_is_named(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    left = fourbit.prepare(build("llama", dtype), fused=False).fourbit_prepared.left
    assert ("float16" in left.get("bfloat16", "")) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_as_close_to_the_exact_one_as_plain_torch_is(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    with dispatch.use("reference"):
        exact = losses(exactly(model))
        plain = losses(copy.deepcopy(model))
    fourbit.prepare(model, gradient_checkpointing=False)
    ours = losses(model)
    assert exact[0] - exact[-1] > 0.01
    floor = 4 * torch.finfo(dtype).eps * exact
    assert ((ours - exact).abs() <= FACTOR * (plain - exact).abs().max() + floor).all()
