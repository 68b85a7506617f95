"""Native: the gated activation of an MLP. csrc/kernels/swiglu.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads
from fourbit.kernels.rows import as_rows

__all__ = ["ACTIVATIONS", "accepts_swiglu", "accepts_swiglu_backward", "swiglu", "swiglu_backward"]

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_forward = bind("fb_swiglu", [POINTER, I64, POINTER, I64, I32, I64, I64, I32, POINTER, I32])
_backward = bind("fb_swiglu_backward", [POINTER, POINTER, I64, POINTER, I64, I32, I64, I64, I32, POINTER, POINTER, I32])


def accepts_swiglu(gate: Tensor, up: Tensor, activation: str) -> str | None:
    """fp32, fp16 and bf16 of one shape."""
    if gate.dtype not in DTYPES or gate.dim() == 0:
        return f"it takes no {gate.dtype} of {gate.dim()} dimensions"
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return "gate and up differ in shape or dtype"
    return None


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `kernels.ops.swiglu`."""
    gate, gate_stride = as_rows(gate)
    up, up_stride = as_rows(up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    cols = gate.shape[-1]
    status = _forward(
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        DTYPES[gate.dtype],
        gate.numel() // max(cols, 1),
        cols,
        ACTIVATIONS[activation],
        out.data_ptr(),
        threads(),
    )
    check(status, "fb_swiglu")
    return out


def accepts_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> str | None:
    """As forward; the gradient has the shape and dtype of gate."""
    if grad.shape != gate.shape or grad.dtype != gate.dtype:
        return f"the gradient is {list(grad.shape)} of {grad.dtype}"
    return accepts_swiglu(gate, up, activation)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad = grad.contiguous()
    gate, gate_stride = as_rows(gate)
    up, up_stride = as_rows(up)
    grad_gate, grad_up = torch.empty_like(grad), torch.empty_like(grad)
    cols = gate.shape[-1]
    status = _backward(
        grad.data_ptr(),
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        DTYPES[gate.dtype],
        gate.numel() // max(cols, 1),
        cols,
        ACTIVATIONS[activation],
        grad_gate.data_ptr(),
        grad_up.data_ptr(),
        threads(),
    )
    check(status, "fb_swiglu_backward")
    return grad_gate, grad_up
