"""What holds for every operation, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fourbit import QuantConfig
from fourbit.kernels import ops
from fourbit.kernels.ops import quantize as quantize_contract
from fourbit.nn import QuantLinear
from fourbit.quant import tensor


def attended(x: Tensor) -> Tensor:
    return ops.attention(x[None, None], x[None, None], x[None, None], causal=True, scale=1.0)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: ops.rms_norm(x, torch.ones(64), eps=1e-6),
        lambda x: ops.swiglu(x, x, activation="silu"),
        attended,
        lambda x: ops.linear_cross_entropy(x, torch.ones(9, 64), torch.arange(8)),
    ],
    ids=["rms_norm", "swiglu", "attention", "cross_entropy"],
)
def test_a_second_derivative_is_refused_and_not_zero(forward: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8, 64, requires_grad=True)

    def differentiate_twice() -> None:
        (grad,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()

    with pytest.raises(NotImplementedError, match="no second derivative"):
        differentiate_twice()


def test_tensors_on_two_devices_are_refused() -> None:
    """With one of them on the meta device torch would hand out memory that nothing was written to."""
    with pytest.raises(RuntimeError, match="on one device; found cpu and meta"):
        ops.rms_norm(torch.randn(2, 64), torch.ones(64, device="meta"), eps=1e-6)
    layer = QuantLinear.from_linear(nn.Linear(64, 64), QuantConfig()).to("meta")
    with pytest.raises(RuntimeError, match="on one device; found cpu and meta"):
        layer(torch.randn(2, 64))


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode], ids=["inference", "fake"])
def test_what_is_cached_is_of_use_to_everybody(mode: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "_levels", {})
    monkeypatch.setattr(quantize_contract, "_tables_by_device", {})
    weight = torch.randn(64, 64)
    with mode():  # type: ignore[attr-defined]
        tensor.levels_on("nf4", torch.device("cpu"))
        quantize_contract._tables(tensor.codebook("nf4"), torch.device("cpu"))
    layer = QuantLinear.from_linear(nn.Linear(64, 64), QuantConfig())
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(tensor.quantize(weight).dequantize()).all()
