"""Contract: 4-bit codes and scales back to numbers.

The scales of a weight come in one of two forms, and every operation that reads a quantized weight takes both:

    plain   absmax [G] fp32;  nested_absmax and nested_offset are None
    nested  absmax [G] uint8; nested_absmax [ceil(G/256)] fp32; nested_offset [] fp32
            scale[g] = fp32(dynamic_map[absmax[g]] * nested_absmax[g // 256]) + nested_offset
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.errors import UnsupportedDtype
from fourbit.formats import NESTED_BLOCK_SIZE, block_count, packed_size
from fourbit.kernels import dispatch, reference

__all__ = ["VALUE_DTYPES", "check_input", "check_sizes", "dequantize_blocks"]

VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_sizes(
    packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, *, block_size: int, shape: Sequence[int]
) -> None:
    """Refuse codes or scales that are not those of a weight of this shape: backends read them unchecked.

    Raises:
        ValueError: says what was given and what fits.
    """
    elements = math.prod(shape)
    blocks = block_count(elements, block_size)
    nested = nested_absmax is None or nested_absmax.numel() == block_count(blocks, NESTED_BLOCK_SIZE)
    if packed.numel() != packed_size(elements) or absmax.numel() != blocks or not nested:
        raise ValueError(
            f"A weight of shape {list(shape)} at block size {block_size} has {packed_size(elements)} packed bytes and"
            f" {blocks} scales; {packed.numel()} and {absmax.numel()} were given."
        )


def check_input(
    x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, *, block_size: int, out_features: int
) -> None:
    """Refuse an `x` that cannot be multiplied with a weight [N, K] in 4 bits.

    Raises:
        UnsupportedDtype: `x` holds integers. ValueError: its last dimension is not K, or the weight's parts do not fit.
    """
    if not x.is_floating_point():
        raise UnsupportedDtype(f"The input of a 4-bit linear layer is {x.dtype}; it must be a floating point tensor.")
    if x.dim() == 0:
        raise ValueError("The input of a linear layer must have at least one dimension.")
    try:
        check_sizes(packed, absmax, nested_absmax, block_size=block_size, shape=(out_features, x.shape[-1]))
    except ValueError as error:
        raise ValueError(f"An input of shape {list(x.shape)} does not fit this weight: {error}") from None


def dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    *,
    levels: Tensor,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a quantized weight.

        value[i] = levels[code[i]] * scale[i // block_size]

    one fp32 product, rounded once to `dtype` (nearest, ties to even).

    Args:
        packed: [ceil(n/2)] uint8, the even element in the high nibble; n is the product of `shape`.
        absmax: [ceil(n/block_size)] scales, fp32 or nested uint8 (see the module's head).
        levels: [16] fp32, the codebook by code.
        shape: of the result.
        dtype: fp32, fp16 or bf16.
        out: a contiguous buffer of that shape and dtype to write into; a reused one saves the page faults that cost
            more than the decoding.

    Returns:
        the weight, `out` where it was given.

    Raises:
        UnsupportedDtype; ValueError for an `out`, codes or scales that do not fit.
    """
    if dtype not in VALUE_DTYPES:
        raise UnsupportedDtype(f"A weight cannot be decoded to {dtype}; ask for float32, float16 or bfloat16.")
    if out is None:
        out = packed.new_empty(tuple(shape), dtype=dtype)
    elif out.shape != torch.Size(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"`out` must be a contiguous {dtype} tensor of shape {list(shape)}, not {_describe(out)}.")
    check_sizes(packed, absmax, nested_absmax, block_size=block_size, shape=shape)
    torch.ops.fourbit.dequantize_blocks(packed, absmax, nested_absmax, nested_offset, levels, block_size, out)
    return out


def _describe(tensor: Tensor) -> str:
    return f"a {'contiguous' if tensor.is_contiguous() else 'strided'} {tensor.dtype} one of {list(tensor.shape)}"


def _fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out: Tensor,
) -> None:
    check_sizes(packed, absmax, nested_absmax, block_size=block_size, shape=out.shape)


dispatch.define(
    "dequantize_blocks(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor levels,"
    " int block_size, Tensor(a!) out) -> ()",
    stem="dequantize",
    reference=reference.dequantize_blocks,
    fake=_fake,
)
