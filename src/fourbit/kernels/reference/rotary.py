"""Reference: rotary position embedding, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotary"]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.rotary`."""
    if inverse:
        first, second = sin.chunk(2, dim=-1)
        sin = -torch.cat((second, first), dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    batch, heads, tokens, head = x.shape
    rotated = x[..., : cos.shape[-1]]
    first, second = rotated.chunk(2, dim=-1)
    y = x.new_empty((batch, tokens, heads, head)).transpose(1, 2)
    y[..., : cos.shape[-1]] = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    y[..., cos.shape[-1] :] = x[..., cos.shape[-1] :]
    return y
