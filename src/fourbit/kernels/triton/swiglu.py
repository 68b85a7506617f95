"""Triton: the gated activation of an MLP.

Elementwise: a program takes 1,024 elements of one row. Rows have a stride, so that the halves of a projection that
makes gate and up side by side are read where they lie. Rounding is that of two operations of torch: act(gate), and in
the backward pass dy * up, are rounded to the dtype before the product.

Cost: 3 reads or writes of a [T, K] tensor forward, 5 backward; nothing else is kept.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.kernels.rows import as_rows
from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.rounding import round_to

__all__ = ["accepts_swiglu", "accepts_swiglu_backward", "swiglu", "swiglu_backward"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 1024
_SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)
_TRIPLE = tl.constexpr(3 * 0.044715)


@triton.jit
def _argument(x, SILU: tl.constexpr):
    """What the sigmoid is taken of: (1 + tanh u) / 2 is the sigmoid of 2u."""
    return x if SILU else (x + (x * x * x) * _CUBIC) * _SLOPE


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _forward(gate, up, out, gate_stride, up_stride, cols, SILU: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    x = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0)
    other = tl.load(up + row * up_stride + col, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    active = round_to(wide * _sigmoid(_argument(wide, SILU)), x.dtype)
    tl.store(out + row * cols + col, round_to(active.to(tl.float32) * other.to(tl.float32), x.dtype), mask=inside)


@triton.jit
def _backward(
    grad, gate, up, grad_gate, grad_up, gate_stride, up_stride, cols, SILU: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    x = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0)
    other = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    pulled = tl.load(grad + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float32)
    share = _sigmoid(_argument(wide, SILU))
    slope = 1.0 if SILU else (wide * wide * _TRIPLE + 1.0) * _SLOPE
    derivative = share * (1.0 + wide * slope * (1.0 - share))
    active = round_to(wide * share, x.dtype).to(tl.float32)
    through = round_to(pulled * other, x.dtype).to(tl.float32)
    tl.store(grad_gate + row * cols + col, round_to(through * derivative, x.dtype), mask=inside)
    tl.store(grad_up + row * cols + col, round_to(pulled * active, x.dtype), mask=inside)


def accepts_swiglu(gate: Tensor, up: Tensor, activation: str) -> str | None:
    """fp32, fp16 and bf16 of one shape."""
    if gate.dtype not in _DTYPES or gate.dim() == 0:
        return f"it takes no {gate.dtype} of {gate.dim()} dimensions"
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return "gate and up differ in shape or dtype"
    return None


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `kernels.ops.swiglu`."""
    gate, gate_stride = as_rows(gate)
    up, up_stride = as_rows(up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel():
        with guard(gate):
            _forward[_grid(gate)](
                gate, up, out, gate_stride, up_stride, gate.shape[-1], activation == "silu", _BLOCK, **EXACT
            )
    return out


def accepts_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> str | None:
    """As forward; the gradient has the shape and dtype of gate."""
    if grad.shape != gate.shape or grad.dtype != gate.dtype:
        return f"the gradient is {list(grad.shape)} of {grad.dtype}"
    return accepts_swiglu(gate, up, activation)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    gate, gate_stride = as_rows(gate)
    up, up_stride = as_rows(up)
    grad = grad.contiguous()
    grad_gate, grad_up = torch.empty_like(grad), torch.empty_like(grad)
    if grad.numel():
        with guard(gate):
            _backward[_grid(gate)](
                grad,
                gate,
                up,
                grad_gate,
                grad_up,
                gate_stride,
                up_stride,
                gate.shape[-1],
                activation == "silu",
                _BLOCK,
                **EXACT,
            )
    return grad_gate, grad_up


def _grid(x: Tensor) -> tuple[int]:
    cols = x.shape[-1]
    return (x.numel() // cols * triton.cdiv(cols, _BLOCK),)
