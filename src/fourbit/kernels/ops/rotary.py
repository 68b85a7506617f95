"""Contract: rotary position embedding of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference

__all__ = ["rotary"]


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate pairs of elements of every head by angles that grow with the position.

    With a and b the halves of a head's first D' elements, and cos and sin split likewise:

        y_a = a cos_a - b sin_a
        y_b = b cos_b + a sin_b          the other D - D' elements stay

    Args:
        q: [B, H, T, D] and
        k: [B, H_kv, T, D], one dtype.
        cos, sin: [B or 1, T, D'], D' <= D even, same dtype; they get no gradient.

    Returns:
        q and k rotated, [B, H, T, D] and [B, H_kv, T, D], laid out as [B, T, H, D] in memory, which is how a projection
        writes them and how its gradient is wanted. Each product is rounded to the dtype, as separate operations would.

    Raises:
        ValueError: shapes or dtypes do not fit together.

    Backward: the transposed rotation; nothing but cos and sin is kept between the passes.

    Source: Su et al. 2021, arXiv:2104.09864; halves as in GPT-NeoX, not interleaved.
    """
    _check(q, k, cos, sin)
    rotated: tuple[Tensor, Tensor] = torch.ops.fourbit.rotary(q, k, cos, sin, False)
    return rotated


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, tokens, head = (q.shape[0], *q.shape[2:]) if q.dim() == 4 else (0, 0, 0)
    fits = (
        q.dim() == 4
        and k.dim() == 4
        and (k.shape[0], *k.shape[2:]) == (batch, tokens, head)
        and cos.shape == sin.shape
        and cos.dim() == 3
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == tokens
        and cos.shape[2] <= head
        and cos.shape[2] % 2 == 0
        and q.dtype == k.dtype == cos.dtype == sin.dtype
    )
    if not fits:
        shapes = ", ".join(f"{list(x.shape)} of {x.dtype}" for x in (q, k, cos, sin))
        raise ValueError(f"q, k, cos and sin do not fit together: {shapes}.")


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin)
    batch, _, tokens, head = q.shape

    def like(x: Tensor) -> Tensor:
        return x.new_empty((batch, tokens, x.shape[1], head)).transpose(1, 2)

    return like(q), like(k)


dispatch.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    stem="rotary",
    reference=reference.rotary,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return *torch.ops.fourbit.rotary(grad_q, grad_k, cos, sin, not ctx.inverse), None, None, None


torch.library.register_autograd("fourbit::rotary", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
