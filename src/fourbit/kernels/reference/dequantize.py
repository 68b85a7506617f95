"""Reference: decode a quantized weight, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels.reference.absmax import dequantize_absmax

__all__ = ["decode", "dequantize_blocks"]


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
    bytes_ = packed.reshape(-1)
    codes = torch.stack((bytes_ >> 4, bytes_ & 0xF), dim=1).view(-1)[:elements].int()
    scales = absmax
    if nested_absmax is not None and nested_offset is not None:
        scales = dequantize_absmax(absmax, nested_absmax, nested_offset)
    by_element = scales.repeat_interleave(block_size)[:elements]
    out.copy_((levels[codes] * by_element).view(out.shape))


def decode(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize_blocks` into a new tensor."""
    out = packed.new_empty(shape, dtype=dtype)
    dequantize_blocks(packed, absmax, nested_absmax, nested_offset, levels, block_size, out)
    return out
