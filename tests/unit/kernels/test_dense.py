"""A few rows times a weight that is not quantized: every backend and level against fp64."""

from __future__ import annotations

import pytest
import torch

from fourbit.kernels import dispatch, ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("outputs", "features"), [(1, 1), (4, 64), (7, 33), (130, 100), (64, 257)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product(backend: str, dtype: torch.dtype, rows: int, outputs: int, features: int, with_bias: bool) -> None:
    """Summed in fp32 in any order, then rounded once: the bound of the contract.

    torch's own product, which the reference and more rows take, may add the bias after rounding: one rounding more.
    """
    generator = torch.Generator().manual_seed(rows + outputs)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, features), (outputs, features), (outputs,))
    )
    with dispatch.use("reference" if backend == "reference" else "auto"):  # native leaves many rows to torch
        y = ops.dense(x, weight, bias=bias if with_bias else None)
    exact = x.double() @ weight.double().t()
    size = x.double().abs() @ weight.double().abs().t()
    unit = torch.finfo(dtype).eps / 2
    bound = (features + 1) * torch.finfo(torch.float32).eps * size + unit * exact.abs()
    if with_bias:
        bound = bound + unit * (exact.abs() + 2 * (exact + bias.double()).abs() + bias.double().abs())
        exact = exact + bias.double()
    assert y.dtype == dtype
    assert y.shape == (rows, outputs)
    assert ((y.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


def test_leading_dimensions(backend: str) -> None:
    x, weight = torch.randn(2, 1, 48), torch.randn(10, 48)
    assert torch.equal(ops.dense(x, weight), ops.dense(x.view(2, 48), weight).view(2, 1, 10))


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\[10, 48\] of torch.float32 does not fit"):
        ops.dense(torch.randn(2, 47), torch.randn(10, 48))
    with pytest.raises(ValueError, match="does not fit"):
        ops.dense(torch.randn(2, 48).bfloat16(), torch.randn(10, 48))
    with pytest.raises(ValueError, match="A bias"):
        ops.dense(torch.randn(2, 48), torch.randn(10, 48), bias=torch.randn(9))
