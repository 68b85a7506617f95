"""The gated activation: every backend and level against fp64, the gradient against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourbit.kernels import ops
from fourbit.kernels.ops.swiglu import ACTIVATIONS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1,), (3, 7), (2, 3, 64), (3, 513), (2, 1500), (0, 8), (4, 0)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    return (4 * gate).to(dtype), up.to(dtype), grad.to(dtype)


def unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def smallest(dtype: torch.dtype) -> float:
    """The distance between subnormal numbers."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def exact(gate: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """act(gate), its derivative and the argument of its exponential, in fp64."""
    x = gate.double().requires_grad_()
    if activation == "silu":
        argument, y = x, torch.nn.functional.silu(x)
    else:
        argument = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        y = torch.nn.functional.gelu(x, approximate="tanh")
    (derivative,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), derivative, argument.detach()


def act_error(y: Tensor, gate: Tensor, argument: Tensor) -> Tensor:
    """Error of act(gate) in fp32.

    Where the form is x sigmoid(s): an exponential within 2 ulp whose argument carries a relative error of 6 roundings,
    a sum, a quotient and a product. Where the form is x/2 (1 + tanh u), as in torch's GELU, the sum loses what is below
    the last place of 1 as tanh u nears -1, so that x times 4 roundings are lost outright.
    """
    u = unit(torch.float32)
    return (10 + 6 * argument.abs()) * u * y.abs() + 4 * u * gate.double().abs()


def derivative_error_of(x: Tensor, argument: Tensor, activation: str) -> Tensor:
    """Error of s + x s (1 - s) slope in fp32, s = sigmoid(argument).

    s errs by its argument's 6 roundings times its slope s (1 - s), and 3 of its own; 1 - s by as much and one; and
    there are 6 more operations. The form of torch's GELU, with tanh for s, errs by 4 roundings of 1 and of |x slope|.
    """
    u = unit(torch.float32)
    slope = 1.0 if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    s, reach = torch.sigmoid(argument), (x * slope).abs()
    error = u * s * (6 * (1 - s) * argument.abs() + 3)
    own = error * (1 + reach) + u * s * (6 + reach * (1 + 6 * (1 - s)))
    return own + (0 if activation == "silu" else 4 * u * (1 + reach))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(backend: str, dtype: torch.dtype, shape: tuple[int, ...], activation: str) -> None:
    gate, up, _ = inputs(shape, dtype)
    out = ops.swiglu(gate, up, activation=activation)
    y, _, argument = exact(gate, activation)
    # act(gate) is rounded, then the product
    rounded = y.abs() * unit(dtype) + smallest(dtype) + act_error(y, gate, argument)
    bound = up.double().abs() * rounded * (1 + unit(dtype)) + (y * up).abs() * unit(dtype) + smallest(dtype)
    assert out.dtype == dtype
    assert out.shape == gate.shape
    assert ((out.double() - y * up.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward(backend: str, dtype: torch.dtype, shape: tuple[int, ...], activation: str) -> None:
    gate, up, grad = inputs(shape, dtype)
    grad_gate, grad_up = torch.ops.fourbit.swiglu_backward(grad, gate, up, activation)
    y, derivative, argument = exact(gate, activation)
    rounded = y.abs() * unit(dtype) + smallest(dtype) + act_error(y, gate, argument)
    g = grad.double()
    bound = g.abs() * rounded * (1 + unit(dtype)) + (g * y).abs() * unit(dtype) + smallest(dtype)
    assert ((grad_up.double() - g * y).abs() <= bound).all()

    # dy * up is rounded, the derivative errs by `derivative_error`, and the product is rounded
    product = g * up.double()
    derivative_error = derivative_error_of(gate.double(), argument, activation)
    error = product.abs() * (2 * unit(dtype) * derivative.abs() * (1 + unit(dtype)) + derivative_error)
    tiny = smallest(dtype) * (1 + derivative.abs())
    assert ((grad_gate.double() - product * derivative).abs() <= error + tiny).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(backend: str, activation: str) -> None:
    gate = torch.tensor([-torch.inf, -1e30, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e10, torch.nan])
    up = torch.ones_like(gate)
    out = ops.swiglu(gate, up, activation=activation)
    assert out[-1].isnan()
    assert (out[2:4].abs() < 1e-30).all()
    assert out[4:6].tolist() == [0.0, 0.0]
    assert torch.equal(out[6:9], gate[6:9])


def test_halves_of_a_wider_tensor_are_read_where_they_lie(level: str) -> None:
    both = torch.randn(2, 5, 26, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gate, up = both.chunk(2, dim=-1)
    grad = torch.randn(2, 5, 13).to(torch.bfloat16)
    assert torch.equal(ops.swiglu(gate, up), ops.swiglu(gate.contiguous(), up.contiguous()))
    ours = torch.ops.fourbit.swiglu_backward(grad, gate, up, "silu")
    plain = torch.ops.fourbit.swiglu_backward(grad, gate.contiguous(), up.contiguous(), "silu")
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    transposed = ops.swiglu(gate.transpose(0, 1), up.transpose(0, 1))
    assert torch.equal(transposed, ops.swiglu(gate, up).transpose(0, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: ops.swiglu(gate, up, activation=activation), (gate, up))


def test_opcheck() -> None:
    gate, up, grad = inputs((2, 3, 16), torch.float32)
    torch.library.opcheck(
        torch.ops.fourbit.swiglu.default, (gate.clone().requires_grad_(), up.clone().requires_grad_(), "silu")
    )
    torch.library.opcheck(torch.ops.fourbit.swiglu_backward.default, (grad, gate, up, "gelu_tanh"))


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="up is"):
        ops.swiglu(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="up is"):
        ops.swiglu(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="no activation 'relu'"):
        ops.swiglu(torch.ones(2), torch.ones(2), activation="relu")
