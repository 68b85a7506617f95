"""Reference: double quantization, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.formats import NESTED_BLOCK_SIZE, dynamic_bins, dynamic_map
from fourbit.formats.dynamic8 import BINS

__all__ = ["dequantize_absmax", "quantize_absmax"]


def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.absmax.quantize_absmax`.

    A block is multiplied by fp32(1 / its largest magnitude). In a block of zeros that is 0 * inf = NaN, which the clamp
    of bitsandbytes sends to -1 and so to code 0; the scale 0 decodes it to the offset all the same.
    """
    centred = absmax - offset
    padding = -centred.numel() % NESTED_BLOCK_SIZE
    blocks = torch.nn.functional.pad(centred, (0, padding)).view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(dim=1)
    normalised = (blocks * (1.0 / nested_absmax).unsqueeze(1)).nan_to_num(nan=-1.0).clamp(-1, 1)
    bins = ((normalised + 1.0) * 0.5 * (BINS - 1) + 0.5).int()
    codes = torch.from_numpy(dynamic_bins()).to(absmax.device)[bins]
    return codes.view(-1)[: absmax.numel()].contiguous(), nested_absmax


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """See `kernels.ops.absmax.dequantize_absmax`: one product and one sum, each rounded to fp32."""
    levels = torch.from_numpy(dynamic_map()).to(codes.device)[codes.int()]
    return levels * nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()] + nested_offset
