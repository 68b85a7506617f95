"""Arithmetic in 16 bits that is the same compiled and interpreted.

Triton's interpreter holds bf16 as the integers of its bits: it cuts a number off where a GPU rounds it, reads subnormal
ones as others, and multiplies those integers in a dot product. Kernels call these in place of `.to` and `tl.dot`;
compiled they are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourbit.kernels.triton.launch import interpreted

__all__ = ["dot", "round_to", "widen"]

INTERPRETED: tl.constexpr = tl.constexpr(interpreted())


@triton.jit
def round_to(value, KIND: tl.constexpr):
    """`value.to(KIND)` of fp32, to nearest with ties to even."""
    if INTERPRETED and tl.bfloat16 == KIND:
        bits = value.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        result = tl.where(value == value, up, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(KIND)
    return result


@triton.jit
def widen(value):
    """`value.to(tl.float32)` of fp32, fp16 or bf16, which is exact."""
    if INTERPRETED and tl.bfloat16 == value.dtype.scalar:
        result = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        result = value.to(tl.float32)
    return result


@triton.jit
def dot(left, right):
    """`tl.dot` of fp16 or bf16 factors, with fp32 sums."""
    return tl.dot(widen(left), widen(right), input_precision="ieee") if INTERPRETED else tl.dot(left, right)
