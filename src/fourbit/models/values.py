"""Looks for NaN and infinity without a copy of the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["holds_nan", "is_finite"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. True for what has no values, or none that could be."""
    return bool(torch.isfinite(_extremes(tensor)).all())


def holds_nan(tensor: Tensor) -> bool:
    """Whether an element is NaN."""
    return bool(torch.isnan(_extremes(tensor)).any())


def _extremes(tensor: Tensor) -> Tensor:
    """[2]: the least and the greatest element, both NaN where there is one, at one pass over the tensor."""
    if tensor.dtype not in _DTYPES or not tensor.numel() or tensor.device.type == "meta":
        return torch.zeros(2)
    return torch.stack(torch.aminmax(tensor))
