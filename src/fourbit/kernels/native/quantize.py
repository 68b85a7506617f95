"""Native: quantize a weight. csrc/kernels/quantize.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.errors import NonFiniteWeight
from fourbit.formats import block_count, packed_size
from fourbit.kernels.native.library import DTYPES, I32, I64, NON_FINITE, POINTER, bind, check, threads

__all__ = ["accepts_quantize_blocks", "quantize_blocks"]

_quantize = bind("fb_quantize", [POINTER, I32, I64, I64, POINTER, POINTER, POINTER, POINTER, I32])


def accepts_quantize_blocks(weight: Tensor, thresholds: Tensor, codes: Tensor, block_size: int) -> str | None:
    """fp32, fp16 and bf16 weights."""
    return None if weight.dtype in DTYPES else f"it takes no {weight.dtype}"


def quantize_blocks(weight: Tensor, thresholds: Tensor, codes: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.quantize.quantize_blocks`; thresholds [15] fp32, codes [16] uint8 by rank."""
    weight = weight.detach().contiguous()
    elements = weight.numel()
    packed = weight.new_empty(packed_size(elements), dtype=torch.uint8)
    absmax = weight.new_empty(block_count(elements, block_size), dtype=torch.float32)
    status = _quantize(
        weight.data_ptr(),
        DTYPES[weight.dtype],
        elements,
        block_size,
        thresholds.data_ptr(),
        codes.data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        threads(),
    )
    if status == NON_FINITE:
        raise NonFiniteWeight("The weight holds NaN or infinity and cannot be quantized.")
    check(status, "fb_quantize")
    return packed, absmax
