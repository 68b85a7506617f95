"""Contract: a few rows times a weight that is not quantized, as the head of a model that writes one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference

__all__ = ["dense"]


def dense(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight in the dtype of `x`: y = x W^T + bias. It has no gradient.

    Args:
        x: [..., K].
        weight: W [N, K], dtype of `x`.
        bias: [N], dtype of `x`.

    Returns:
        [..., N], dtype of `x`.

    Error: |y - y*| <= K eps_32 sum |x||w| + eps_y |y*|: a backend sums in fp32, in its own order, and rounds once.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(x, weight, bias)
    y: Tensor = torch.ops.fourbit.dense(x, weight, bias)
    return y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or x.dim() == 0 or weight.dtype != x.dtype or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"A weight {list(weight.shape)} of {weight.dtype} does not fit an input {list(x.shape)} of {x.dtype}."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"A bias {list(bias.shape)} of {bias.dtype} does not fit {weight.shape[0]} of {x.dtype}.")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


dispatch.define(
    "dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor", stem="dense", reference=reference.dense, fake=_fake
)
