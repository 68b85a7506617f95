"""Root-mean-square norm: every backend and level against fp64, the gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit.kernels import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CONVENTIONS = [(0.0, True), (1.0, False), (0.0, False)]
SHAPES = [(1, 1), (3, 7), (2, 3, 64), (5, 513), (4, 1024), (2, 1500), (0, 8)]
EPS = 1e-6


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = 3 * torch.randn(shape, generator=generator)
    weight, grad = torch.randn(shape[-1], generator=generator), torch.randn(shape, generator=generator)
    return x.to(dtype), weight.to(dtype), grad.to(dtype)


def unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def chain(cols: int) -> float:
    """Relative error of a sum of `cols` terms of one sign in fp32, plus a few single operations.

    Native adds at most 512 terms in fp32 before it goes on in fp64; torch adds pairwise, in shorter chains.
    """
    return (min(cols, 512) + 16) * unit(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("offset", "round_first"), CONVENTIONS)
def test_forward(backend: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float, round_first: bool) -> None:
    x, weight, _ = inputs(shape, dtype)
    y = ops.rms_norm(x, weight, eps=EPS, offset=offset, round_first=round_first)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (weight.double() + offset)
    bound = exact.abs() * (2 * unit(dtype) + chain(shape[-1])) + torch.finfo(dtype).smallest_normal * unit(dtype) * 2
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_backward(backend: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    x, weight, grad = inputs(shape, dtype)
    grad_x, grad_weight = torch.ops.fourbit.rms_norm_backward(grad, x, weight, EPS, offset, True)
    wide, w, g = x.double(), weight.double() + offset, grad.double()
    r = 1 / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    normalised = wide * r
    pull = (g * w * normalised).mean(-1, keepdim=True)
    exact = r * (g * w - normalised * pull)
    # both terms carry the error of r, of one chain over the row, and a few roundings; then one rounding to the dtype
    terms = r * ((g * w).abs() + normalised.abs() * (g * w * normalised).abs().mean(-1, keepdim=True))
    tiny = 2 * torch.finfo(dtype).smallest_normal * unit(dtype)
    assert ((grad_x.double() - exact).abs() <= exact.abs() * unit(dtype) + 3 * chain(shape[-1]) * terms + tiny).all()

    rows = x.numel() // shape[-1]
    products = (g * normalised).reshape(rows, shape[-1])
    error = (chain(shape[-1]) + (rows + 2) * unit(torch.float32)) * products.abs().sum(0)
    assert ((grad_weight.double() - products.sum(0)).abs() <= products.sum(0).abs() * unit(dtype) + error + tiny).all()


def test_backward_without_the_weights_gradient() -> None:
    x, weight, grad = inputs((3, 40), torch.float32)
    _, grad_weight = torch.ops.fourbit.rms_norm_backward(grad, x, weight, EPS, 0.0, False)
    assert grad_weight.numel() == 0


def test_strided_input(level: str) -> None:
    x, weight, _ = inputs((6, 64), torch.float32)
    strided = x.t().contiguous().t()
    assert torch.equal(ops.rms_norm(strided, weight, eps=EPS), ops.rms_norm(x, weight, eps=EPS))


@pytest.mark.parametrize(("offset", "round_first"), CONVENTIONS)
def test_gradcheck(offset: float, round_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: ops.rms_norm(x, weight, eps=EPS, offset=offset, round_first=round_first), (x, weight)
    )


def test_opcheck() -> None:
    x, weight, grad = inputs((2, 3, 16), torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.fourbit.rms_norm.default, (x, weight, EPS, 0.0, True))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(torch.ops.fourbit.rms_norm_backward.default, (grad, x, weight, EPS, 1.0, True))


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, weight, grad = inputs((2, 16), torch.bfloat16)
    x.requires_grad_()
    ops.rms_norm(x, weight, eps=EPS).backward(grad)
    assert weight.grad is None
    assert torch.equal(x.grad, torch.ops.fourbit.rms_norm_backward(grad, x.detach(), weight, EPS, 0.0, False)[0])


@pytest.mark.parametrize("weight", [torch.ones(7), torch.ones(8, dtype=torch.bfloat16), torch.ones(1, 8)])
def test_a_weight_that_does_not_fit(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="norm's weight"):
        ops.rms_norm(torch.ones(2, 8), weight, eps=EPS)
