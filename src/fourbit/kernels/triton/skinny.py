"""Triton: a few tokens times a quantized weight, straight from 4 bits, on the tensor cores.

    y[m, n] = sum_g scale[n, g] (sum_{k in g} level[code[n, k]] x[m, k]) + addend[m, n]

The weight is the left factor, as its rows fill the tall side of the tensor cores' tiles and a few tokens the short one.
One step takes one group of every row, a run of elements with one scale: levels, exact or rounded to the type of x, meet
x on the tensor cores, and the scale is applied to the sums in fp32. So a weight is rounded at most once, and never as
the product of its level and scale.

Few rows of W make few programs, so the groups are split between SPLITS programs as well. Each leaves its sums in a
buffer, and a second kernel adds them in the order of the splits, so that the result has the same bits each time. (A
counter by which the program that comes last adds them would save that launch, but is state that every stream and every
captured graph would need of its own.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourbit.kernels.triton.codes import byte_tables, code_at, look_up, permuted
from fourbit.kernels.triton.rounding import dot, round_to, widen
from fourbit.kernels.triton.weight import load_scales

__all__ = ["add_splits", "skinny"]


@triton.jit
def skinny(
    x, packed, absmax, nested_absmax, nested_offset, nested_map, levels, addend, y,
    tokens, rows, groups, addend_stride,
    GROUP: tl.constexpr, GROUPS_PER_SCALE: tl.constexpr, IS_NESTED: tl.constexpr, HAS_ADDEND: tl.constexpr,
    LOOKUP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] W^T + addend; a program per BLOCK_N rows of W, BLOCK_M tokens and split.

    Args:
        packed: of W [rows, groups * GROUP], at a multiple of four bytes.
        addend: [N] with a stride of 0 between tokens, or [M, N] with N.
        y: [M, N]; or, if SPLITS > 1, the sums of each split, [SPLITS, M, N] fp32, without the addend.
    """
    WORDS: tl.constexpr = GROUP // 8
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_group = tl.minimum(row, rows - 1).to(tl.int64) * groups
    words = packed.to(tl.pointer_type(tl.int32)) + (first_group * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    inputs = x + (token.to(tl.int64) * groups * GROUP)[None, :] + tl.arange(0, GROUP)[:, None]
    valid = token < tokens
    if LOOKUP == "permute":
        tables = byte_tables(levels, x.dtype.element_ty)

    total = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    per_split = tl.cdiv(groups, SPLITS)
    for group in range(split * per_split, tl.minimum((split + 1) * per_split, groups)):
        codes = tl.load(words + group * WORDS)
        scale = load_scales(
            absmax, nested_absmax, nested_offset, nested_map,
            (first_group + group) // GROUPS_PER_SCALE, row >= 0, IS_NESTED,
        )  # fmt: skip
        value = tl.load(inputs + group * GROUP, mask=valid[None, :], other=0.0)
        if LOOKUP == "permute":
            level = _permuted_levels(codes, tables, x.dtype.element_ty, BLOCK_N, WORDS)
        else:
            level = round_to(_levels(codes, levels, LOOKUP, BLOCK_N, WORDS), x.dtype.element_ty)
        total = tl.fma(dot(level, value), tl.broadcast_to(scale[:, None], [BLOCK_N, BLOCK_M]), total)

    inside = (row < rows)[:, None] & valid[None, :]
    place = token.to(tl.int64)[None, :] * rows + row[:, None]
    if HAS_ADDEND:
        added = addend + token.to(tl.int64)[None, :] * addend_stride + row[:, None]
        total += widen(tl.load(added, mask=inside, other=0.0))
    tl.store(y + split * tokens.to(tl.int64) * rows + place, round_to(total, y.dtype.element_ty), mask=inside)


@triton.jit
def add_splits(
    sums, addend, y, count, rows, addend_stride,
    SPLITS: tl.constexpr, HAS_ADDEND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y [M, N], M * N = count, as the sum of `sums` [SPLITS, M, N] in their order, and the addend."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < count
    total = tl.zeros([TILE], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * count.to(tl.int64) + place, mask=inside, other=0.0)
    if HAS_ADDEND:
        added = addend + place // rows * addend_stride + place % rows
        total += widen(tl.load(added, mask=inside, other=0.0))
    tl.store(y + place, round_to(total, y.dtype.element_ty), mask=inside)


@triton.jit
def _levels(codes, levels, LOOKUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """fp32 levels [ROWS, 8 * WORDS] of the eight codes of each word, in order."""
    l04 = tl.join(look_up(code_at(codes, 0), levels, LOOKUP), look_up(code_at(codes, 4), levels, LOOKUP))
    l15 = tl.join(look_up(code_at(codes, 1), levels, LOOKUP), look_up(code_at(codes, 5), levels, LOOKUP))
    l26 = tl.join(look_up(code_at(codes, 2), levels, LOOKUP), look_up(code_at(codes, 6), levels, LOOKUP))
    l37 = tl.join(look_up(code_at(codes, 3), levels, LOOKUP), look_up(code_at(codes, 7), levels, LOOKUP))
    return tl.reshape(tl.join(tl.join(l04, l26), tl.join(l15, l37)), [ROWS, WORDS * 8])


@triton.jit
def _permuted_levels(codes, tables, KIND: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """The same in KIND, fp16 or bf16."""
    p01, p23, p45, p67 = permuted(codes, tables)
    pairs = tl.reshape(tl.join(tl.join(p01, p45), tl.join(p23, p67)), [ROWS, WORDS * 4])
    both = tl.join((pairs & 65535).to(tl.uint16), ((pairs >> 16) & 65535).to(tl.uint16))
    return tl.reshape(both, [ROWS, WORDS * 8]).to(KIND, bitcast=True)
