"""Reference: attention, in plain torch, with the whole matrix of scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["HIDDEN_BELOW", "attention", "attention_backward"]

HIDDEN_BELOW = -1e30
"""An additive mask hides a key with the lowest number of its dtype as often as with -inf; both mean the same here."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.attention`. Returns out and lse, computed in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q.to(wide), k.to(wide), mask, causal, scale)
    lse = scores.logsumexp(dim=-1)
    out = _probabilities(scores, lse) @ _for_queries(v.to(wide), q.shape[1])
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def attention_backward(
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
    """See `kernels.ops.attention`. Returns dq, dk, dv, laid out as q, k, v.

    delta is taken as sum(p * dp), which is the sum(dout * out) of the contract without the rounding of `out`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[1]
    p = _probabilities(_scores(q.to(wide), k.to(wide), mask, causal, scale), lse)
    grad_out = grad.transpose(1, 2).to(wide)
    grad_p = grad_out @ _for_queries(v.to(wide), heads).mT
    grad_scores = p * (grad_p - (p * grad_p).sum(dim=-1, keepdim=True)) * scale
    grad_q = grad_scores @ _for_queries(k.to(wide), heads)
    grad_k = _for_keys(grad_scores.mT @ q.to(wide), k.shape[1])
    grad_v = _for_keys(p.mT @ grad_out, k.shape[1])
    return (
        torch.empty_like(q).copy_(grad_q),
        torch.empty_like(k).copy_(grad_k),
        torch.empty_like(v).copy_(grad_v),
    )


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """[B, H, T_q, T_k], -inf where a query does not see a key."""
    scores = (q @ _for_queries(k, q.shape[1]).mT) * scale
    queries, keys = scores.shape[-2:]
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return (scores + mask).masked_fill(mask <= HIDDEN_BELOW, -math.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), zero in rows that see nothing."""
    return (scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp()


def _for_queries(x: Tensor, heads: int) -> Tensor:
    """[B, H_kv, T, D] -> [B, H, T, D], each head for the queries that read it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _for_keys(x: Tensor, heads: int) -> Tensor:
    """[B, H, T, D] -> [B, H_kv, T, D], the sum over the queries that read a head."""
    return x.view(x.shape[0], heads, -1, *x.shape[2:]).sum(dim=2)
