"""Triton: a weight to 4-bit codes and one scale per block.

A program takes some whole blocks; the last one also the shorter last block. Codes are found by rank: three selections
between thresholds in registers and one look-up walk the sorted fifteen, so an element costs some thirty instructions
against 2.5 bytes of traffic (16-bit weights). Rounding is the reference's: a whole block is multiplied by the
reciprocal of its scale, itself a division that rounds to nearest, and the last block is divided.

Whether a number is not finite is known only when all are read: the kernel raises a flag, and the call waits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.errors import NonFiniteWeight
from fourbit.formats import block_count, packed_size
from fourbit.kernels.reference.quantize import SMALLEST_ABSMAX
from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.rounding import widen

__all__ = ["accepts_quantize_blocks", "quantize_blocks"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 4096
SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_ABSMAX)


def accepts_quantize_blocks(weight: Tensor, thresholds: Tensor, codes: Tensor, block_size: int) -> str | None:
    """fp32, fp16 and bf16 weights."""
    return None if weight.dtype in DTYPES else f"it takes no {weight.dtype}"


def quantize_blocks(weight: Tensor, thresholds: Tensor, codes: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.quantize.quantize_blocks`; thresholds [15] fp32, codes [16] uint8 by rank."""
    weight = weight.detach().contiguous()
    elements = weight.numel()
    blocks = block_count(elements, block_size)
    packed = weight.new_empty(packed_size(elements), dtype=torch.uint8)
    absmax = weight.new_empty(blocks, dtype=torch.float32)
    if not elements:
        return packed, absmax
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    rows = max(1, TILE // block_size)
    with guard(weight):
        _quantize[(triton.cdiv(blocks, rows),)](
            weight, thresholds, codes, packed, absmax, flag, elements, BLOCK=block_size, ROWS=rows, **EXACT
        )
    if int(flag):
        raise NonFiniteWeight("The weight holds NaN or infinity and cannot be quantized.")
    return packed, absmax


@triton.jit
def _quantize(weight, thresholds, codes, packed, absmax, flag, elements, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    left = tl.minimum(elements - first, ROWS * BLOCK).to(tl.int32)
    if left == ROWS * BLOCK:  # without a mask Triton reads and writes 16 bytes at a time
        _quantize_tile(weight, thresholds, codes, packed, absmax, flag, first, left, BLOCK, ROWS, False)
    else:
        _quantize_tile(weight, thresholds, codes, packed, absmax, flag, first, left, BLOCK, ROWS, True)


@triton.jit
def _quantize_tile(
    weight, thresholds, codes, packed, absmax, flag, first, left,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """`left` elements from `first` on; all of a tile's unless IS_LAST."""
    row = tl.arange(0, ROWS)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    byte = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    if IS_LAST:
        value = widen(tl.load(weight + first + index, mask=index < left, other=0.0))
    else:
        value = widen(tl.load(weight + first + index))
    magnitude = tl.abs(value)
    if tl.max(tl.max((magnitude < float("inf")).to(tl.int32) ^ 1, axis=1), axis=0) != 0:
        tl.store(flag, 1)
    largest = tl.max(magnitude, axis=1)
    divisor = tl.maximum(largest, tl.full([ROWS], SMALLEST, tl.float32))
    inverse = tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), divisor)
    normalised = value * inverse[:, None]
    if IS_LAST:  # where the last block is shorter it divides, and keeps what it divided by
        is_tail = (row == left // BLOCK) & (left % BLOCK != 0)
        quotient = tl.math.div_rn(value, tl.broadcast_to(divisor[:, None], [ROWS, BLOCK]))
        normalised = tl.where(is_tail[:, None], quotient, normalised)
        largest = tl.where(is_tail, divisor, largest)
    tl.store(absmax + first // BLOCK + row, largest, mask=row * BLOCK < left)

    rank = _rank(tl.minimum(tl.maximum(normalised, -1.0), 1.0), thresholds, ROWS * BLOCK)
    code = _pick(tl.load(codes + tl.arange(0, 16)).to(tl.int32), rank, ROWS * BLOCK)
    even, odd = tl.split(tl.reshape(code, [ROWS, BLOCK // 2, 2]))
    both = ((even << 4) | odd).to(tl.uint8)
    if IS_LAST:
        tl.store(packed + first // 2 + byte, both, mask=byte * 2 < left)
    else:
        tl.store(packed + first // 2 + byte, both)


@triton.jit
def _rank(value, thresholds, COUNT: tl.constexpr):
    """How many of the fifteen ascending thresholds are below each value, bit by bit from the highest."""
    eighth = value > tl.load(thresholds + 7)
    fourth = value > tl.where(eighth, tl.load(thresholds + 11), tl.load(thresholds + 3))
    upper = tl.where(fourth, tl.load(thresholds + 13), tl.load(thresholds + 9))
    lower = tl.where(fourth, tl.load(thresholds + 5), tl.load(thresholds + 1))
    second = value > tl.where(eighth, upper, lower)
    rank = eighth.to(tl.int32) * 8 + fourth.to(tl.int32) * 4 + second.to(tl.int32) * 2
    place = tl.arange(0, 16)
    last = _pick(tl.load(thresholds + place, mask=place < 15, other=0.0), rank, COUNT)
    return rank + (value > last).to(tl.int32)


@triton.jit
def _pick(table, index, COUNT: tl.constexpr):
    """The entries of a table of 16 by COUNT indices of any shape."""
    return tl.reshape(tl.gather(table, tl.reshape(index, [COUNT]), 0), index.shape)
