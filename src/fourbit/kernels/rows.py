"""A tensor as rows that lie evenly, which is what a kernel with one stride can read."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_rows"]


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """A tensor with its rows at one distance from each other, and that distance; half of a wider one stays."""
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2)):
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]
