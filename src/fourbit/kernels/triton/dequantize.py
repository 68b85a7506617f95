"""Triton: decode a quantized weight.

A program takes a tile of whole blocks: it reads the codes of a block as consecutive bytes, looks both nibbles up in the
sixteen levels, multiplies by the block's scale in fp32, rounds once, and writes the two values of each byte beside each
other. Bound by memory: 2.5 bytes an element for 16-bit values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.formats import block_count
from fourbit.kernels.parts import refusal
from fourbit.kernels.triton.codes import look_up
from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.rounding import round_to
from fourbit.kernels.triton.weight import load_scales, nested_map

__all__ = ["accepts_dequantize_blocks", "dequantize_blocks"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 4096


def accepts_dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out: Tensor,
) -> str | None:
    """Contiguous parts, and a contiguous `out` of fp32, fp16 or bf16."""
    if out.dtype not in DTYPES or not out.is_contiguous():
        return f"it writes contiguous fp32, fp16 or bf16, not {out.dtype}"
    return refusal(packed, absmax, nested_absmax, nested_offset, levels, block_size, out.numel())


def dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    """See `kernels.ops.dequantize`; writes into `out`, whose shape and dtype say what is wanted."""
    elements = out.numel()
    if not elements:
        return
    rows = max(1, TILE // block_size)
    nested = nested_absmax is not None
    with guard(packed):
        _dequantize[(triton.cdiv(block_count(elements, block_size), rows),)](
            packed, absmax, nested_absmax, nested_offset, nested_map(packed.device) if nested else None, levels, out,
            elements, BLOCK=block_size, ROWS=rows, IS_NESTED=nested, **EXACT,
        )  # fmt: skip


@triton.jit
def _dequantize(
    packed, absmax, nested_absmax, nested_offset, nested_map, levels, out, elements,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, IS_NESTED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    left = tl.minimum(elements - first, ROWS * BLOCK).to(tl.int32)
    scales = absmax, nested_absmax, nested_offset, nested_map
    if left == ROWS * BLOCK:  # without a mask Triton reads and writes 16 bytes at a time
        _decode_tile(packed, scales, levels, out, first, left, BLOCK, ROWS, IS_NESTED, False)
    else:
        _decode_tile(packed, scales, levels, out, first, left, BLOCK, ROWS, IS_NESTED, True)


@triton.jit
def _decode_tile(
    packed, scales, levels, out, first, left,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, IS_NESTED: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """`left` elements from `first` on; all of a tile's unless IS_LAST."""
    HALF: tl.constexpr = BLOCK // 2
    row = tl.arange(0, ROWS)
    byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if IS_LAST:
        both = tl.load(packed + first // 2 + byte, mask=byte * 2 < left, other=0).to(tl.int32)
        valid = row * BLOCK < left
    else:
        both = tl.load(packed + first // 2 + byte).to(tl.int32)
        valid = row >= 0
    block = first // BLOCK + row
    scale = load_scales(scales[0], scales[1], scales[2], scales[3], block, valid, IS_NESTED)[:, None]
    even = round_to(look_up(both >> 4, levels, "gather") * scale, out.dtype.element_ty)
    odd = round_to(look_up(both & 15, levels, "gather") * scale, out.dtype.element_ty)
    value = tl.reshape(tl.join(even, odd), [ROWS, BLOCK])
    if IS_LAST:
        tl.store(out + first + index, value, mask=index < left)
    else:
        tl.store(out + first + index, value)
