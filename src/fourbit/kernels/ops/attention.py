"""Contract: scaled dot-product attention that never forms the [T_q, T_k] matrix.

    s = scale * q k^T + mask,   lse = log sum_j exp(s_j),   p = exp(s - lse),   out = p v

    dv = p^T dout
    ds = p * (dout v^T - delta),   delta = sum(dout * out) per row
    dq = scale * ds k,   dk = scale * ds^T q

The forward pass keeps its inputs, its output and one number per row (lse); the backward pass computes p anew.

Shapes: q [B, H, T_q, D], k [B, H_kv, T_k, D], v [B, H_kv, T_k, D_v], out [B, T_q, H, D_v] contiguous (what the output
projection reads), lse [B, H, T_q]. H is a multiple of H_kv; query head h reads key head h // (H / H_kv).
Cost: 2 (D + D_v) flops forward and 6 D + 4 D_v backward per query, head and visible key.

Error of any backend, with eps = 2^-24, u half a unit in the last place of the dtype (2^-8 for bf16, eps for fp32) and
w = u where p and ds are rounded to bf16 for products of bf16 (native at avx512bf16), else 0:

    e      = (D + 8) eps scale |q| |k|^T + 8 eps (|s| + |lse|)      of a score;
    r      = 2 max e + (T_k + D_v + 64) eps                         of a p or a sum, relatively, over a row;
    |out|  : (w + r) p |v| + u |out|
    |ds|   : (w + r) |ds| + p (r |dout| |v|^T + sum(|dout| (w + r + u) p |v|))
    |dq|   : scale (error(ds) + r |ds|) |k| + u |dq|                and dk likewise, with |q|
    |dv|   : ((w + r) p)^T |dout| + u |dv|

each the product of absolute values, to first order. Rounding to the dtype dominates; tests reach 0.97 of the bound.

Source: Vaswani et al. 2017, arXiv:1706.03762; Dao et al. 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend to values by the softmax of scaled products of queries and keys (see the module's head).

    Args:
        q, k, v: see above; floating point, one dtype; any strides.
        mask: broadcastable to [B, H, T_q, T_k]; bool, true where a query sees a key, or floating point, added to the
            scores, where -1e30 and less hides a key. It gets no gradient.
        causal: query t sees keys up to t + T_k - T_q only, so that the last query sees all, as with a key-value cache.
        scale: 1 / sqrt(D) unless given.

    Returns:
        out, dtype of `q`. A query that sees no key gets zeros, and so do its gradients.

    Raises:
        ValueError: shapes or dtypes do not fit together, or the mask wants a gradient.
    """
    _check(q, k, v, mask)
    if mask is not None and mask.requires_grad:
        raise ValueError("An attention mask gets no gradient here; detach it, or use another attention.")
    out: Tensor = torch.ops.fourbit.attention(q, k, v, mask, causal, q.shape[-1] ** -0.5 if scale is None else scale)[0]
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    fits = (
        q.dim() == k.dim() == v.dim() == 4
        and q.shape[0] == k.shape[0] == v.shape[0]
        and k.shape[1] == v.shape[1]
        and q.shape[1] % k.shape[1] == 0
        and k.shape[2] == v.shape[2]
        and q.shape[3] == k.shape[3]
        and q.dtype == k.dtype == v.dtype
        and q.dtype.is_floating_point
    )
    if not fits:
        shapes = ", ".join(f"{list(x.shape)} of {x.dtype}" for x in (q, k, v))
        raise ValueError(f"q, k and v do not fit together: {shapes}.")
    if mask is None:
        return
    scores = (*q.shape[:3], k.shape[2])
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"An attention mask is bool or floating point, not {mask.dtype}.")
    if mask.dim() > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], scores[::-1], strict=False)):
        raise ValueError(f"An attention mask of {list(mask.shape)} cannot be broadcast to {list(scores)}.")


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mask)
    batch, heads, queries, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((batch, queries, heads, v.shape[3])), q.new_empty((batch, heads, queries), dtype=lse_dtype)


def _fake_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


dispatch.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> (Tensor, Tensor)",
    stem="attention",
    reference=reference.attention,
    fake=_fake,
)
dispatch.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, bool causal,"
    " float scale) -> (Tensor, Tensor, Tensor)",
    stem="attention",
    reference=reference.attention_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    gradients = torch.ops.fourbit.attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.scale)
    needed = (x if needs else None for x, needs in zip(gradients, ctx.needs_input_grad, strict=False))
    return (*needed, None, None, None)


torch.library.register_autograd("fourbit::attention", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
dispatch.refuse_second_derivative("attention_backward")
