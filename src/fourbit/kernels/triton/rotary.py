"""Triton: rotary position embedding of queries and keys, in one launch.

A program takes one token and some of its heads, so that its row of cos and sin is read once for all of them. Heads are
read where they lie, by their strides, and written as [B, T, H, D], which is how a projection writes them. Both products
are rounded to the dtype before they are added, as separate operations would; multiply and add are kept from being fused
for the same reason, so that the bits are those of the reference.

Cost: queries and keys read once and written once; nothing is kept for the backward pass, which is the same kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.rounding import round_to

__all__ = ["accepts_rotary", "rotary"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE = 1024
"""Pairs of a program."""
_MAX_HEAD = 8192


@triton.jit
def _rotate(
    q, k, cos, sin, rotated_q, rotated_k,
    q_batch, q_head, q_token, k_batch, k_head, k_token, table_batch,
    tokens, q_heads, k_heads, HEAD: tl.constexpr, HALF: tl.constexpr,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    table = batch * table_batch + token * (2 * HALF) + pair
    known = pair < HALF
    cos_a = tl.load(cos + table, mask=known, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + table + HALF, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + table, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + table + HALF, mask=known, other=0.0).to(tl.float32)[None, :]

    group, q_groups = tl.program_id(1), tl.cdiv(q_heads, HEADS)
    if group < q_groups:
        source = q + batch * q_batch + token * q_token
        target = rotated_q + (batch * tokens + token) * q_heads * HEAD
        _rotate_heads(
            source, target, group * HEADS, q_heads, q_head, cos_a, cos_b, sin_a, sin_b,
            HEAD, HALF, INVERSE, HEADS, PAIRS, REST,
        )  # fmt: skip
    else:
        source = k + batch * k_batch + token * k_token
        target = rotated_k + (batch * tokens + token) * k_heads * HEAD
        _rotate_heads(
            source, target, (group - q_groups) * HEADS, k_heads, k_head, cos_a, cos_b, sin_a, sin_b,
            HEAD, HALF, INVERSE, HEADS, PAIRS, REST,
        )  # fmt: skip


@triton.jit
def _rotate_heads(
    source, target, first, heads, stride, cos_a, cos_b, sin_a, sin_b,
    HEAD: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    head = (first + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < HALF)
    x = source + head.to(tl.int64) * stride
    y = target + head * HEAD
    a = tl.load(x + pair, mask=inside, other=0.0)
    b = tl.load(x + pair + HALF, mask=inside, other=0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    a_cos, b_cos = round_to(a * cos_a, dtype).to(tl.float32), round_to(b * cos_b, dtype).to(tl.float32)
    if INVERSE:
        first_half = a_cos + round_to(b * sin_b, dtype).to(tl.float32)
        second_half = b_cos - round_to(a * sin_a, dtype).to(tl.float32)
    else:
        first_half = a_cos - round_to(b * sin_a, dtype).to(tl.float32)
        second_half = b_cos + round_to(a * sin_b, dtype).to(tl.float32)
    tl.store(y + pair, round_to(first_half, dtype), mask=inside)
    tl.store(y + pair + HALF, round_to(second_half, dtype), mask=inside)
    if REST > 0:
        rest = 2 * HALF + tl.arange(0, REST)[None, :]
        other = (head < heads) & (rest < HEAD)
        tl.store(y + rest, tl.load(x + rest, mask=other), mask=other)


def accepts_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> str | None:
    """fp32, fp16 and bf16, heads of up to 8,192."""
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return f"it takes one of fp32, fp16 and bf16 for all, not {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}"
    if q.dim() != 4 or k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        return "q and k are not [B, H, T, D]"
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != q.shape[2]:
        return "cos and sin are not [B or 1, T, D']"
    if cos.shape[2] > q.shape[3] or cos.shape[2] % 2 or q.shape[3] > _MAX_HEAD:
        return f"{cos.shape[2]} elements to rotate of {q.shape[3]} are odd, or too many"
    return None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.rotary`."""
    cos, sin = cos.contiguous(), sin.contiguous()
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, _, tokens, head = q.shape
    rotated_q, rotated_k = (x.new_empty((batch, tokens, x.shape[1], head)).transpose(1, 2) for x in (q, k))
    if batch * tokens * head == 0:
        return rotated_q, rotated_k
    half = cos.shape[2] // 2
    pairs = triton.next_power_of_2(max(half, 1))
    heads = max(1, min(_TILE // pairs, triton.next_power_of_2(q.shape[1])))
    left = head - 2 * half
    with guard(q):
        _rotate[(batch * tokens, triton.cdiv(q.shape[1], heads) + triton.cdiv(k.shape[1], heads))](
            q, k, cos, sin, rotated_q, rotated_k,
            *q.stride()[:3], *k.stride()[:3], cos.stride(0) if cos.shape[0] > 1 else 0,
            tokens, q.shape[1], k.shape[1], head, half,
            inverse, heads, pairs, triton.next_power_of_2(left) if left else 0,
            **EXACT,
        )  # fmt: skip
    return rotated_q, rotated_k
