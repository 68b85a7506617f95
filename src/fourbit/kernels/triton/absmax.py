"""Triton: double quantization, the scales of a weight in 8 bits.

One program takes some blocks of 256 scales. Rounding is the reference's, step by step: a division that rounds to
nearest, no fused multiply-add, NaN (0 * inf in a block of zeros) to -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.formats import NESTED_BLOCK_SIZE, block_count, dynamic_bins
from fourbit.formats.dynamic8 import BINS
from fourbit.kernels import dispatch
from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.weight import load_scales, nested_map

__all__ = ["accepts_dequantize_absmax", "accepts_quantize_absmax", "dequantize_absmax", "quantize_absmax"]

LAST_BIN: tl.constexpr = tl.constexpr(BINS - 1)
ROWS = 4
DECODED = 1024

_bins: dict[torch.device, Tensor] = {}


def accepts_quantize_absmax(absmax: Tensor, offset: Tensor) -> str | None:
    """fp32 scales and offset."""
    return None if absmax.dtype == offset.dtype == torch.float32 else f"scales are float32, not {absmax.dtype}"


def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.absmax.quantize_absmax`."""
    absmax = absmax.contiguous()
    count = absmax.numel()
    blocks = block_count(count, NESTED_BLOCK_SIZE)
    codes = absmax.new_empty(count, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(blocks)
    if count:
        with guard(absmax):
            _quantize[(triton.cdiv(blocks, ROWS),)](
                absmax, offset, _bins_on(absmax.device), codes, nested_absmax, count, blocks,
                BLOCK=NESTED_BLOCK_SIZE, ROWS=ROWS, **EXACT,
            )  # fmt: skip
    return codes, nested_absmax


def accepts_dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> str | None:
    """uint8 codes with fp32 second-level scales and offset."""
    if codes.dtype != torch.uint8 or not nested_absmax.dtype == nested_offset.dtype == torch.float32:
        return "nested scales are uint8 codes with an fp32 absmax and offset"
    if nested_absmax.numel() != block_count(codes.numel(), NESTED_BLOCK_SIZE):
        return f"there is not one second-level scale per {NESTED_BLOCK_SIZE} scales"
    return None


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """See `kernels.ops.absmax.dequantize_absmax`."""
    codes, nested_absmax = codes.contiguous(), nested_absmax.contiguous()
    count = codes.numel()
    absmax = codes.new_empty(count, dtype=torch.float32)
    if count:
        with guard(codes):
            _dequantize[(triton.cdiv(count, DECODED),)](
                codes, nested_absmax, nested_offset, nested_map(codes.device), absmax, count, TILE=DECODED, **EXACT
            )
    return absmax


def _bins_on(device: torch.device) -> Tensor:
    if device not in _bins:
        with dispatch.kept_for_all():
            _bins[device] = torch.from_numpy(dynamic_bins().copy()).to(device)
    return _bins[device]


@triton.jit
def _quantize(absmax, offset, bins, codes, nested_absmax, count, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < count
    centred = tl.where(inside, tl.load(absmax + index, mask=inside, other=0.0) - tl.load(offset), 0.0)
    largest = tl.max(tl.abs(centred), axis=1)
    tl.store(nested_absmax + rows, largest, mask=rows < blocks)
    inverse = tl.math.div_rn(tl.full([ROWS], 1.0, tl.float32), largest)
    normalised = centred * inverse[:, None]
    normalised = tl.where(normalised != normalised, -1.0, normalised)
    normalised = tl.minimum(tl.maximum(normalised, -1.0), 1.0)
    place = ((normalised + 1.0) * 0.5 * LAST_BIN + 0.5).to(tl.int32)
    tl.store(codes + index, tl.load(bins + place), mask=inside)


@triton.jit
def _dequantize(codes, nested_absmax, nested_offset, nested_map, absmax, count, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < count
    scale = load_scales(codes, nested_absmax, nested_offset, nested_map, index, inside, True)
    tl.store(absmax + index, scale, mask=inside)
