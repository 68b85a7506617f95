"""Reference: root-mean-square norm, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm", "rms_norm_backward"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    normalised = _wide(x) * _inverse_rms(x, eps)
    if round_first:
        normalised = _wide(normalised.to(x.dtype))
    return (normalised * (_wide(weight) + offset)).to(x.dtype)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; the latter is empty unless needed."""
    inverse = _inverse_rms(x, eps)
    normalised = _wide(x) * inverse
    scaled = _wide(grad) * (_wide(weight) + offset)
    grad_x = inverse * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True))
    grad_weight = weight.new_empty(0)
    if needs_grad_weight:
        grad_weight = (_wide(grad) * normalised).reshape(-1, x.shape[-1]).sum(dim=0).to(weight.dtype)
    return grad_x.to(x.dtype), grad_weight


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(_wide(x).pow(2).mean(-1, keepdim=True) + eps)


def _wide(x: Tensor) -> Tensor:
    """What is computed in: fp32, or fp64 for a gradient check."""
    return x if x.dtype == torch.float64 else x.float()
