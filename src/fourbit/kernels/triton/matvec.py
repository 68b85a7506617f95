"""Triton: one token times a quantized weight, straight from 4 bits: the kernel of decoding.

    y[n] = sum_g scale[n, g] sum_{k in g} level[code[n, k]] x[k] + addend[n]

A group g is a run of consecutive elements of a row that share a scale. A program takes some rows; a tile of it is
[rows, groups, words of a group], so that a thread reads 16 consecutive bytes of a row, and one scale for them. Levels
meet x in fp32 and the scale is applied to their sum: an eighth of an operation per element. Codes are looked up as
`codes` tells.

Cost: 4 bits and 8/64 or 32/64 per element, from memory once; every program reads all of x, from the caches.
No two programs add into one result, so the sum has one order and the result the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourbit.kernels.triton.codes import byte_tables, code_at, look_up, permuted
from fourbit.kernels.triton.rounding import round_to, widen
from fourbit.kernels.triton.weight import load_scales

__all__ = ["matvec"]


@triton.jit
def matvec(
    x, packed, absmax, nested_absmax, nested_offset, nested_map, levels, addend, y, rows, groups, addend_stride,
    GROUP: tl.constexpr, GROUPS_PER_SCALE: tl.constexpr, IS_NESTED: tl.constexpr, HAS_ADDEND: tl.constexpr,
    LOOKUP: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T + addend; a program per BLOCK_N rows of W and token.

    Args:
        packed: of W [rows, groups * GROUP], at a multiple of four bytes.
        addend: [N] with a stride of 0 between tokens, or [M, N] with N.
    """
    WORDS: tl.constexpr = GROUP // 8
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_group = tl.minimum(row, rows - 1).to(tl.int64) * groups
    group, word = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_G * WORDS)
    words = packed.to(tl.pointer_type(tl.int32)) + (first_group * WORDS)[:, None]
    x += token * groups * GROUP
    if LOOKUP == "permute":
        tables = byte_tables(levels, x.dtype.element_ty)

    total = tl.zeros([BLOCK_N, BLOCK_G, WORDS], dtype=tl.float32)
    for start in range(0, groups, BLOCK_G):
        end = start + BLOCK_G if EVEN else groups
        here, place = start + group, start * WORDS + word
        inside = here < end
        codes = tl.load(words + place[None, :], mask=(place < end * WORDS)[None, :], other=0)
        scale = load_scales(
            absmax, nested_absmax, nested_offset, nested_map,
            (first_group[:, None] + here[None, :]) // GROUPS_PER_SCALE, inside[None, :], IS_NESTED,
        )  # fmt: skip
        inputs = _inputs(x, start * GROUP, groups * GROUP, BLOCK_G * WORDS, EVEN)
        part = tl.zeros([BLOCK_N, BLOCK_G * WORDS], dtype=tl.float32)
        if LOOKUP == "permute":
            pairs = permuted(codes, tables)
            for index in tl.static_range(4):
                even, odd = _halves(pairs[index], x.dtype.element_ty)
                part = tl.fma(even, widen(inputs[2 * index][None, :]), part)
                part = tl.fma(odd, widen(inputs[2 * index + 1][None, :]), part)
        else:
            for index in tl.static_range(8):
                level = look_up(code_at(codes, index), levels, LOOKUP)
                part = tl.fma(level, widen(inputs[index][None, :]), part)
        part = tl.reshape(part, [BLOCK_N, BLOCK_G, WORDS])
        total = tl.fma(part, tl.broadcast_to(scale[:, :, None], [BLOCK_N, BLOCK_G, WORDS]), total)

    result = tl.sum(tl.sum(total, axis=2), axis=1)
    if HAS_ADDEND:
        result += widen(tl.load(addend + token * addend_stride + row, mask=row < rows, other=0.0))
    tl.store(y + token * rows + row, round_to(result, y.dtype.element_ty), mask=row < rows)


@triton.jit
def _inputs(x, start, columns, WORDS: tl.constexpr, EVEN: tl.constexpr):
    """x from an element on, as the eight elements of each of some words."""
    place = start + tl.arange(0, WORDS * 8)
    value = tl.load(x + place, mask=place < (start + WORDS * 8 if EVEN else columns), other=0.0)
    even, odd = tl.split(tl.reshape(value, [WORDS, 2, 2, 2]))
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _halves(pair, KIND: tl.constexpr):
    """The two 16-bit numbers of a word as fp32."""
    if tl.bfloat16 == KIND:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pair & 65535).to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)
        high = ((pair >> 16) & 65535).to(tl.uint16).to(KIND, bitcast=True).to(tl.float32)
    return low, high
