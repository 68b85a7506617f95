"""Eight codes of a 32-bit word to eight levels, in one of several ways.

Byte b of a word (the machine is little endian) holds elements 2b, in its high nibble, and 2b + 1, so element e lies at
bit `8 (e // 2) + 4 (1 - e % 2)`. What a lookup costs decides whether a product of one token is bound by memory: at
70% of an H100's bandwidth a multiprocessor has to decode some 19 codes a clock, beside 128 lanes of arithmetic, of
which half take integers, and 32 lanes of loads.

    memory   a load from the sixteen fp32 levels, 64 bytes that stay in the first-level cache: one load an element
    gather   `tl.gather` from a register tensor, which Triton keeps in shared memory: one shared load an element
    select   a tree of fifteen selections: no memory at all
    permute  bytes picked by PTX `prmt`: four codes find one byte of their levels in three instructions, so eight
             levels of two bytes cost sixteen and eight; levels are rounded to the 16-bit type of the input

All but `permute` give fp32 levels as they are; `permute` is for NVIDIA, and for products in 16 bits. The interpreter
has no PTX and takes `gather`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourbit.kernels.triton.rounding import round_to

__all__ = ["LOOKUPS", "byte_tables", "code_at", "look_up", "permuted"]

LOOKUPS = ("memory", "gather", "select", "permute")


@triton.jit
def code_at(word, ELEMENT: tl.constexpr):
    """The code of one of the eight elements of each word, int32."""
    return (word >> (8 * (ELEMENT // 2) + 4 * (1 - ELEMENT % 2))) & 15


@triton.jit
def look_up(code, levels, LOOKUP: tl.constexpr):
    """fp32 levels of int32 codes, by `memory`, `gather` or `select`."""
    if LOOKUP == "memory":
        level = tl.load(levels + code)
    elif LOOKUP == "gather":
        table = tl.load(levels + tl.arange(0, 16))
        level = tl.reshape(tl.gather(table, tl.reshape(code, [code.numel]), 0), code.shape)
    else:
        tl.static_assert(LOOKUP == "select")
        level = _select(code, levels, 0, 8)
    return level


@triton.jit
def _select(code, levels, FIRST: tl.constexpr, HALF: tl.constexpr):
    """The level of a code among the 2 * HALF from FIRST on; the bit of value HALF says which half."""
    if HALF == 1:
        below = tl.load(levels + FIRST)
        above = tl.load(levels + FIRST + 1)
    else:
        below = _select(code, levels, FIRST, HALF // 2)
        above = _select(code, levels, FIRST + HALF, HALF // 2)
    return tl.where((code & HALF) != 0, above, below)


@triton.jit
def byte_tables(levels, KIND: tl.constexpr):
    """The sixteen levels rounded to KIND (fp16 or bf16), four to a 32-bit word: low bytes, then high bytes."""
    code = tl.arange(0, 16)
    bits = round_to(tl.load(levels + code), KIND).to(tl.uint16, bitcast=True).to(tl.int32)
    low = (bits & 255) << (8 * (code % 4))
    high = (bits >> 8) << (8 * (code % 4))
    which = code // 4
    # a sum of disjoint bits is their union
    l0 = tl.sum(tl.where(which == 0, low, 0), axis=0)
    l1 = tl.sum(tl.where(which == 1, low, 0), axis=0)
    l2 = tl.sum(tl.where(which == 2, low, 0), axis=0)
    l3 = tl.sum(tl.where(which == 3, low, 0), axis=0)
    h0 = tl.sum(tl.where(which == 0, high, 0), axis=0)
    h1 = tl.sum(tl.where(which == 1, high, 0), axis=0)
    h2 = tl.sum(tl.where(which == 2, high, 0), axis=0)
    h3 = tl.sum(tl.where(which == 3, high, 0), axis=0)
    return l0, l1, l2, l3, h0, h1, h2, h3


# Operands: $0-$3 results, pairs of elements (0, 1) to (6, 7) with the even one in the low half; $4 the word;
# $5-$8 low bytes, $9-$12 high bytes. prmt picks four bytes out of eight by the low three bits of four nibbles: once
# among codes 0 to 7, once among 8 to 15, and then between the two by the nibbles' highest bits.
PERMUTE: tl.constexpr = tl.constexpr(
    """
    {
    .reg .b32 code, which, a, b, low, high;
    and.b32 code, $4, 0x77777777;
    shr.u32 which, $4, 1;
    lop3.b32 which, which, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 a, $5, $6, code;
    prmt.b32 b, $7, $8, code;
    prmt.b32 low, a, b, which;
    prmt.b32 a, $9, $10, code;
    prmt.b32 b, $11, $12, code;
    prmt.b32 high, a, b, which;
    prmt.b32 $0, low, high, 0x4051;
    prmt.b32 $1, low, high, 0x6273;
    shr.u32 code, code, 16;
    shr.u32 which, which, 16;
    prmt.b32 a, $5, $6, code;
    prmt.b32 b, $7, $8, code;
    prmt.b32 low, a, b, which;
    prmt.b32 a, $9, $10, code;
    prmt.b32 b, $11, $12, code;
    prmt.b32 high, a, b, which;
    prmt.b32 $2, low, high, 0x4051;
    prmt.b32 $3, low, high, 0x6273;
    }
    """
)


@triton.jit
def permuted(word, tables):
    """The levels of eight codes as four tensors of 32-bit words, each two 16-bit levels, the even element's below."""
    return tl.inline_asm_elementwise(
        PERMUTE,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [word, tables[0], tables[1], tables[2], tables[3], tables[4], tables[5], tables[6], tables[7]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
