"""The product with a weight in 4 bits: every backend and level against fp64, the gradients, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.errors import UnsupportedDtype
from fourbit.kernels import dispatch, ops
from fourbit.quant import QuantConfig, QuantizedTensor, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N x K: whole blocks, rows that share a block, odd sizes, one column, one row, a tail
WEIGHTS = [(64, 64), (48, 172), (33, 70), (5, 1), (1, 65), (7, 515), (130, 256)]
LEADING: list[tuple[int, ...]] = [(), (1,), (3,), (2, 5), (2, 0), (70,)]


def unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def case(
    weight: tuple[int, int], leading: tuple[int, ...], dtype: torch.dtype, **settings: Any
) -> tuple[Tensor, QuantizedTensor, Tensor]:
    generator = torch.Generator().manual_seed(weight[0] * 1000 + weight[1] + sum(leading))
    x = torch.randn(*leading, weight[1], generator=generator).to(dtype)
    bias = torch.randn(weight[0], generator=generator)
    with dispatch.use("reference"):
        return x, quantize(torch.randn(weight, generator=generator), QuantConfig(**settings)), bias


def arguments(q: QuantizedTensor) -> dict[str, Any]:
    return {
        "absmax": q.absmax,
        "nested_absmax": q.nested_absmax,
        "nested_offset": q.nested_offset,
        "levels": q.levels,
        "block_size": q.block_size,
    }


def flat(q: QuantizedTensor) -> tuple[Any, ...]:
    return q.packed, q.absmax, q.nested_absmax, q.nested_offset, q.levels, q.block_size


def bound(x: Tensor, w: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """|y - y*| as `ops.linear` promises: 2 roundings of a weight, K of an fp32 sum, one of the result."""
    weight_error = 0.0 if dtype == torch.float32 else 2 * unit(dtype)
    sums = x.double().abs() @ w.double().abs().t()
    terms = w.shape[1] + 2
    return (weight_error + terms * unit(torch.float32)) * sums + 2 * unit(dtype) * exact.abs() + tiny(dtype, w.shape[1])


def tiny(dtype: torch.dtype, terms: int) -> float:
    """Numbers below the normal range are off by up to their spacing, each weight and the result."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps * (terms * 4 + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_product(backend: str, weight: tuple[int, int], leading: tuple[int, ...], dtype: torch.dtype) -> None:
    x, q, bias = case(weight, leading, dtype)
    y = ops.linear(x, q.packed, bias=bias, out_features=weight[0], **arguments(q))
    w = q.dequantize(torch.float32)
    exact = x.double() @ w.double().t() + bias.to(dtype).double()
    assert y.dtype == dtype
    assert y.shape == (*leading, weight[0])
    # the bias is one more term of the sum, and may be added after a first rounding to the dtype
    extra = unit(dtype) * (exact.abs() + bias.abs())
    assert ((y.double() - exact).abs() <= bound(x, w, exact, dtype) + extra).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 256, 4096])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "nf3"])
def test_every_way_to_quantize(backend: str, format: str, block_size: int, double_quant: bool) -> None:
    settings = {"format": format, "block_size": block_size, "double_quant": double_quant}
    x, q, _ = case((40, 300), (6,), torch.float32, **settings)
    y = ops.linear(x, q.packed, out_features=40, **arguments(q))
    w = q.dequantize(torch.float32)
    exact = x.double() @ w.double().t()
    assert ((y.double() - exact).abs() <= bound(x, w, exact, torch.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradient_of_the_input(backend: str, weight: tuple[int, int], dtype: torch.dtype) -> None:
    _, q, _ = case(weight, (), dtype)
    grad = torch.randn(9, weight[0], generator=torch.Generator().manual_seed(0)).to(dtype)
    got = torch.ops.fourbit.linear_grad_input(grad, *flat(q), weight[1])
    w = q.dequantize(torch.float32)
    exact = grad.double() @ w.double()
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= bound(grad, w.t(), exact, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_autograd_is_the_two_products(backend: str, dtype: torch.dtype) -> None:
    x, q, bias = case((48, 172), (2, 5), dtype)
    x.requires_grad_()
    bias.requires_grad_()
    y = ops.linear(x, q.packed, bias=bias, out_features=48, **arguments(q))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    assert torch.equal(x.grad, torch.ops.fourbit.linear_grad_input(grad, *flat(q), 172))
    assert bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, grad.reshape(-1, 48).sum(dim=0).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(backend: str, dtype: torch.dtype) -> None:
    """The same values give the same bits however they lie; torch's own products do not promise that, so a bound."""
    x, q, _ = case((48, 172), (6, 7), dtype)
    lying = [x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack((x, x), dim=-1)[..., 0]]
    w = q.dequantize(torch.float32)
    exact = x.double() @ w.double().t()
    for other in lying:
        assert not other.is_contiguous()
        y = ops.linear(other, q.packed, out_features=48, **arguments(q))
        assert ((y.double() - exact).abs() <= bound(x, w, exact, dtype)).all()
        leaf = other.detach().requires_grad_()
        ops.linear(leaf, q.packed, out_features=48, **arguments(q)).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == x.shape
    expanded = torch.ones(1, 1, dtype=dtype).expand(6, 48)
    plain = torch.ops.fourbit.linear_grad_input(expanded.contiguous(), *flat(q), 172)
    got = torch.ops.fourbit.linear_grad_input(expanded, *flat(q), 172)
    assert torch.allclose(got, plain, rtol=4 * unit(dtype), atol=1e-4)


def test_one_token_gives_what_many_give(backend: str) -> None:
    """A backend may take another kernel for a few tokens: within the two errors it computes the same rows."""
    for dtype in DTYPES:
        x, q, _ = case((130, 256), (70,), dtype)
        w = q.dequantize(torch.float32)
        exact = x.double() @ w.double().t()
        for tokens in (1, 2, 3, 7, 8, 9, 16, 17, 33):
            y = ops.linear(x[:tokens], q.packed, out_features=130, **arguments(q))
            assert ((y.double() - exact[:tokens]).abs() <= bound(x, w, exact, dtype)[:tokens]).all(), tokens


@pytest.mark.parametrize("double_quant", [False, True])
def test_gradcheck(double_quant: bool) -> None:
    _, q, _ = case((6, 11), (), torch.float32, double_quant=double_quant)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, q.packed, bias=bias, out_features=6, **arguments(q))

    assert torch.autograd.gradcheck(product, (x, bias))
    assert torch.autograd.gradgradcheck(product, (x, bias))


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(choice: str, double_quant: bool) -> None:
    x, q, bias = case((48, 172), (2, 5), torch.float32, double_quant=double_quant)
    with dispatch.use(choice):
        arguments_ = (x.requires_grad_(), *flat(q), 48, bias.requires_grad_())
        torch.library.opcheck(torch.ops.fourbit.linear.default, arguments_)
        grad = torch.randn(2, 5, 48, requires_grad=True)
        torch.library.opcheck(torch.ops.fourbit.linear_grad_input.default, (grad, *flat(q), 172))


def test_autocast_has_no_say_inside(backend: str) -> None:
    x, q, bias = case((48, 172), (5,), torch.float32)
    outside = ops.linear(x, q.packed, bias=bias, out_features=48, **arguments(q))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.linear(x, q.packed, bias=bias, out_features=48, **arguments(q))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_under_inference_mode(backend: str) -> None:
    x, q, _ = case((48, 172), (5,), torch.float32)
    with torch.inference_mode():
        y = ops.linear(x, q.packed, out_features=48, **arguments(q))
    assert torch.equal(y, ops.linear(x, q.packed, out_features=48, **arguments(q)))


def test_under_compile() -> None:
    x, q, bias = case((48, 172), (5,), torch.float32)
    weight = arguments(q)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def product(x: Tensor) -> Tensor:
        return ops.linear(2 * x, q.packed, bias=bias, out_features=48, **weight).square()

    for tokens in (5, 3):
        a, b = (x[:tokens].clone().requires_grad_() for _ in range(2))
        compiled = product(a)
        eager = ops.linear(2 * b, q.packed, bias=bias, out_features=48, **weight).square()
        assert torch.equal(compiled, eager)
        compiled.sum().backward()
        eager.sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_what_does_not_fit() -> None:
    x, q, _ = case((48, 172), (5,), torch.float32)

    def product(x: Tensor, **changes: Any) -> Tensor:
        return ops.linear(x, q.packed, **{"out_features": 48, **arguments(q), **changes})

    with pytest.raises(
        ValueError, match=r"input of shape \[5, 100\] does not fit this weight: .*\[48, 100\].*2400 packed"
    ):
        product(x[:, :100])
    with pytest.raises(ValueError, match=r"\[50, 172\]"):
        product(x, out_features=50)
    with pytest.raises(ValueError, match="scales"):
        product(x, absmax=q.absmax[:-1])
    with pytest.raises(ValueError, match="at block size 32"):
        product(x, block_size=32)
    with pytest.raises(ValueError, match="at least one dimension"):
        product(torch.tensor(1.0))
    with pytest.raises(UnsupportedDtype, match=r"torch.int64; it must be a floating point"):
        product(torch.ones(5, 172, dtype=torch.int64))
    with pytest.raises(ValueError, match="does not fit"):
        product(x[:, :100].to("meta"))
