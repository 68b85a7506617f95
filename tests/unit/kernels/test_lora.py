"""The fused LoRA layer: every backend and level against fp64 and against separate products, the gradients, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.errors import UnsupportedDtype
from fourbit.kernels import dispatch, ops
from fourbit.kernels.dropout import keep_mask
from fourbit.quant import QuantConfig, QuantizedTensor, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALING = 0.75


class Case:
    """A layer y = x W^T + bias + s (d(x) A^T) B^T with N outputs, K inputs and rank R."""

    def __init__(
        self,
        shape: tuple[int, int, int] = (48, 172, 4),
        leading: tuple[int, ...] = (2, 5),
        dtype: torch.dtype = torch.float32,
        *,
        adapter_dtype: torch.dtype | None = None,
        dropout: float = 0.0,
        **settings: Any,
    ) -> None:
        (n, k, r), generator = shape, torch.Generator().manual_seed(sum(shape) + sum(leading))

        def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

        with dispatch.use("reference"):
            self.quantized = quantize(normal(n, k, dtype=torch.float32), QuantConfig(**settings))
        self.x, self.bias = normal(*leading, k), normal(n)
        self.a, self.b = (normal(*size, dtype=adapter_dtype or dtype) for size in ((r, k), (n, r)))
        self.grad = normal(*leading, n).detach()
        self.seed, self.dropout = (torch.tensor(sum(shape)), dropout) if dropout else (None, 0.0)

    @property
    def keep(self) -> Tensor | None:
        return None if self.seed is None else keep_mask(self.x, self.seed, self.dropout)

    @property
    def keep_scale(self) -> float:
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0

    @property
    def weight(self) -> tuple[Any, ...]:
        q: QuantizedTensor = self.quantized
        return q.packed, q.absmax, q.nested_absmax, q.nested_offset, q.levels, q.block_size

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.a, self.b, self.bias

    def fused(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        packed, absmax, nested_absmax, nested_offset, levels, block_size = self.weight
        return ops.lora_linear(
            x, packed, absmax, lora_a=a, lora_b=b, scaling=SCALING, levels=levels, block_size=block_size,
            nested_absmax=nested_absmax, nested_offset=nested_offset, bias=bias, seed=self.seed,
            dropout=self.dropout,
        )  # fmt: skip

    def exact(self) -> list[Tensor]:
        """y, dX, dA, dB, dbias in fp64 by autograd over separate products, from the values as they are stored."""
        x, a, b, bias = (value.detach().double().requires_grad_() for value in self.inputs)
        w = self.quantized.dequantize(torch.float32).double()
        dropped = x if self.keep is None else x * self.keep * self.keep_scale
        y = x @ w.t() + bias + (dropped @ a.t()) @ b.t() * SCALING
        y.backward(self.grad.double())
        return [y.detach(), *(value.grad for value in (x, a, b, bias) if value.grad is not None)]

    def computed(self) -> list[Tensor]:
        for value in self.inputs:
            value.grad = None
        y = self.fused(*self.inputs)
        y.backward(self.grad)
        return [y.detach(), *(value.grad for value in self.inputs if value.grad is not None)]

    def bounds(self) -> list[Tensor]:
        """How far each result may be from `exact`.

        Every product rounds its factors to the dtype (u each), sums in fp32 (one rounding u32 per term) and rounds its
        result (u), so a chain of products is off by at most (their number) * (3u + terms * u32) of what the chain of
        magnitudes gives. The longest chain has three products and a scaling; the last term is for numbers below the
        normal range of fp16.
        """
        dtype = self.x.dtype
        u = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
        terms = max(*self.a.shape, *self.b.shape, self.x[..., 0].numel()) + 8
        x, a, b, grad = (value.detach().double().abs() for value in (self.x, self.a, self.b, self.grad))
        w, bias = self.quantized.dequantize(torch.float32).double().abs(), self.bias.detach().double().abs()
        factor = 4 * (3 * u + terms * torch.finfo(torch.float32).eps / 2)
        scaled = x if self.keep is None else x * self.keep * self.keep_scale
        rows, drows = grad.reshape(-1, grad.shape[-1]), scaled.reshape(-1, x.shape[-1])
        through = (grad @ b @ a) * SCALING
        if self.keep is not None:
            through = through * self.keep * self.keep_scale
        magnitudes = [
            x @ w.t() + bias + (scaled @ a.t()) @ b.t() * SCALING,
            grad @ w + through,
            (rows @ b).t() @ drows * SCALING,
            rows.t() @ (drows @ a.t()) * SCALING,
            rows.sum(dim=0),
        ]
        spacing = float(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
        return [factor * magnitude + terms * 8 * spacing for magnitude in magnitudes]


def assert_right(case: Case) -> None:
    results = case.computed()
    names = ["y", "dX", "dA", "dB", "dbias"]
    for name, got, exact, bound in zip(names, results, case.exact(), case.bounds(), strict=True):
        assert got.shape == exact.shape, name
        assert ((got.double() - exact).abs() <= bound).all(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 172, 4), (64, 128, 16), (33, 70, 3), (5, 1, 1), (1, 65, 2), (130, 256, 64)])
def test_results(backend: str, shape: tuple[int, int, int], dtype: torch.dtype, dropout: float) -> None:
    assert_right(Case(shape, dtype=dtype, dropout=dropout))


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 0), (0,), (2, 3, 4), (100,)])
def test_leading_dimensions(backend: str, leading: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        assert_right(Case(leading=leading, dtype=dtype, dropout=0.3))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_in_its_own_dtype(backend: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """Products run in the dtype of x; gradients come back in the adapter's."""
    case = Case(dtype=dtype, adapter_dtype=adapter_dtype)
    _, _, grad_a, grad_b, grad_bias = case.computed()
    assert grad_a.dtype == grad_b.dtype == adapter_dtype
    assert grad_bias.dtype == dtype
    narrowest = max(torch.finfo(d).eps for d in (dtype, adapter_dtype))
    for got, exact, bound in zip(case.computed(), case.exact(), case.bounds(), strict=True):
        # one more rounding each of A, B and of the gradient to the other's dtype
        rounding = 3 * narrowest / 2 * (bound / (4 * 3 * torch.finfo(dtype).eps / 2))
        assert ((got.double() - exact).abs() <= bound + rounding).all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "nf2"])
def test_every_format(backend: str, format: str, double_quant: bool) -> None:
    assert_right(Case(format=format, double_quant=double_quant, block_size=128))


def test_an_adapter_of_zeros_changes_nothing(backend: str) -> None:
    for dtype in DTYPES:
        case = Case(dtype=dtype)
        packed, absmax, nested_absmax, nested_offset, levels, block_size = case.weight
        plain = ops.linear(
            case.x, packed, absmax, nested_absmax=nested_absmax, nested_offset=nested_offset, levels=levels,
            block_size=block_size, out_features=48, bias=case.bias,
        )  # fmt: skip
        assert torch.equal(case.fused(case.x, case.a, torch.zeros_like(case.b), case.bias), plain)


def test_a_dropout_that_keeps_everything_changes_nothing(backend: str) -> None:
    case = Case()
    plain = case.computed()
    case.seed, case.dropout = torch.tensor(3), 0.0
    for got, expected, bound in zip(case.computed(), plain, case.bounds(), strict=True):
        assert ((got - expected).abs() <= 2 * bound).all()


def test_dropout_spares_the_base(backend: str) -> None:
    case = Case(dropout=1.0)
    y, grad_x, grad_a, grad_b, _ = case.computed()
    packed, absmax, nested_absmax, nested_offset, levels, block_size = case.weight
    expected = torch.ops.fourbit.linear(
        case.x, packed, absmax, nested_absmax, nested_offset, levels, block_size, 48, case.bias
    )
    assert torch.equal(y, expected)
    assert not grad_a.any()
    assert not grad_b.any()
    assert torch.equal(grad_x, torch.ops.fourbit.linear_grad_input(case.grad, *case.weight, 172))


def test_inputs_as_strides_leave_them(backend: str) -> None:
    case = Case(leading=(6, 7), dropout=0.3)  # the mask is laid over the shape, not over the memory
    contiguous = case.computed()
    bounds = case.bounds()
    case.x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not case.x.is_contiguous()
    case.grad = case.grad.transpose(0, 1).contiguous().transpose(0, 1)
    for got, expected, bound in zip(case.computed(), contiguous, bounds, strict=True):
        assert ((got.double() - expected.double()).abs() <= 2 * bound).all()


def test_a_gradient_that_is_one_number_everywhere(backend: str) -> None:
    """`y.sum().backward()` sends an expanded scalar."""
    case = Case()
    case.grad = torch.ones(()).expand_as(case.grad)
    assert_right(case)


def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    case = Case()
    case.x.requires_grad_(False)
    case.fused(*case.inputs).sum().backward()
    assert case.x.grad is None
    assert case.a.grad is not None
    assert not case.quantized.packed.requires_grad
    frozen = Case()
    frozen.a.requires_grad_(False)
    frozen.b.requires_grad_(False)
    frozen.bias.requires_grad_(False)
    frozen.fused(*frozen.inputs).sum().backward()
    assert frozen.x.grad is not None
    assert frozen.a.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("double_quant", [False, True])
def test_gradcheck(double_quant: bool, dropout: float) -> None:
    case = Case((6, 11, 2), (2, 3), torch.float64, dropout=dropout, double_quant=double_quant)
    assert torch.autograd.gradcheck(case.fused, case.inputs)
    assert torch.autograd.gradcheck(lambda x, a, b: case.fused(x, a, b, None), case.inputs[:3])


def test_there_is_no_second_derivative() -> None:
    case = Case()
    (grad,) = torch.autograd.grad(case.fused(*case.inputs).square().sum(), case.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_opcheck(choice: str, dropout: float) -> None:
    case = Case(dropout=dropout)
    adapter = (case.a, case.b, SCALING, case.seed, case.dropout)
    with dispatch.use(choice):
        forward = torch.ops.fourbit.lora_linear.default
        torch.library.opcheck(forward, (case.x, *case.weight, case.bias, *adapter))
        xa = forward(case.x, *case.weight, case.bias, *adapter)[1].detach()
        detached = [value.detach() if isinstance(value, Tensor) else value for value in adapter]
        for needs_grad_x in (True, False):
            torch.library.opcheck(
                torch.ops.fourbit.lora_linear_backward.default,
                (case.grad, case.x.detach(), xa, *case.weight, *detached, needs_grad_x),
            )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_under_compile(dropout: float) -> None:
    case = Case(dropout=dropout)
    eager = case.computed()
    original = case.fused
    case.fused = torch.compile(original, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    assert all(torch.equal(a, b) for a, b in zip(case.computed(), eager, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_copy_of_the_input_is_kept(dropout: float) -> None:
    """What lies between the passes: x itself, d(x) A^T, and constants; no mask, nothing of the size of x or W anew."""
    case = Case(dropout=dropout)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.fused(*case.inputs)
    known = {t.data_ptr() for t in (*case.inputs, *case.weight[:5], case.seed) if isinstance(t, Tensor)}
    new = [t for t in kept if t.data_ptr() not in known]
    assert [tuple(t.shape) for t in new] == [(10, 4)]


def test_what_does_not_fit() -> None:
    case = Case()
    x, a, b, bias = case.inputs
    with pytest.raises(ValueError, match=r"input of shape \[2, 5, 100\]"):
        case.fused(x[..., :100], a[:, :100], b, bias)
    with pytest.raises(ValueError, match=r"shapes \[4, 100\] and \[48, 4\] do not fit an input with 172 features"):
        case.fused(x, a[:, :100], b, bias)
    with pytest.raises(ValueError, match=r"\[4, 172\] and \[48, 3\]"):
        case.fused(x, a, b[:, :3], bias)
    with pytest.raises(ValueError, match=r"\[40, 172\]"):
        case.fused(x, a, b[:40], bias[:40])
    with pytest.raises(UnsupportedDtype, match=r"torch.int32"):
        case.fused(x.int(), a, b, bias)
    case.seed = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"one int64 on the CPU, not \[2\] of torch.int64"):
        case.fused(x, a, b, bias)
