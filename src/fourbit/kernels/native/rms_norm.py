"""Native: root-mean-square norm. csrc/kernels/rms_norm.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads

__all__ = ["accepts_rms_norm", "accepts_rms_norm_backward", "rms_norm", "rms_norm_backward"]

_F32 = ctypes.c_float
_forward = bind("fb_rms_norm", [POINTER, POINTER, I32, I64, I64, _F32, _F32, I32, POINTER, I32])
_backward = bind(
    "fb_rms_norm_backward", [POINTER, POINTER, POINTER, I32, I64, I64, _F32, _F32, POINTER, POINTER, I32, I32]
)


def accepts_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> str | None:
    """fp32, fp16 and bf16."""
    return _refusal(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    cols = x.shape[-1]
    status = _forward(
        x.data_ptr(),
        weight.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // cols,
        cols,
        eps,
        offset,
        round_first,
        y.data_ptr(),
        threads(),
    )
    check(status, "fb_rms_norm")
    return y


def accepts_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs_grad_weight: bool
) -> str | None:
    """As forward; the gradient has the shape and dtype of x."""
    if grad.shape != x.shape or grad.dtype != x.dtype:
        return f"the gradient is {list(grad.shape)} of {grad.dtype}"
    return _refusal(x, weight)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; the latter is empty unless needed."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    cols, parts = x.shape[-1], threads()
    sums = torch.empty((parts, cols), dtype=torch.float32) if needs_grad_weight else None
    status = _backward(
        grad.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // cols,
        cols,
        eps,
        offset,
        grad_x.data_ptr(),
        None if sums is None else sums.data_ptr(),
        parts,
        parts,
    )
    check(status, "fb_rms_norm_backward")
    return grad_x, weight.new_empty(0) if sums is None else sums.sum(dim=0).to(weight.dtype)


def _refusal(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype not in DTYPES:
        return f"it takes no {x.dtype}"
    if x.dim() == 0 or x.shape[-1] == 0 or weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        return f"the weight is {list(weight.shape)} of {weight.dtype}, x {list(x.shape)} of {x.dtype}"
    return None
