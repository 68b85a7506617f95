"""Native: double quantization. csrc/kernels/absmax.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.formats import NESTED_BLOCK_SIZE, block_count, dynamic_bins, dynamic_map
from fourbit.kernels.native.library import I32, I64, POINTER, bind, check, threads

__all__ = ["accepts_dequantize_absmax", "accepts_quantize_absmax", "dequantize_absmax", "quantize_absmax"]

_quantize = bind("fb_quantize_absmax", [POINTER, I64, POINTER, POINTER, POINTER, POINTER, I32])
_dequantize = bind("fb_dequantize_absmax", [POINTER, I64, POINTER, POINTER, POINTER, POINTER, I32])
_BINS = torch.from_numpy(dynamic_bins())
_MAP = torch.from_numpy(dynamic_map())


def accepts_quantize_absmax(absmax: Tensor, offset: Tensor) -> str | None:
    """fp32 scales and offset."""
    return None if absmax.dtype == offset.dtype == torch.float32 else f"scales are float32, not {absmax.dtype}"


def quantize_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.absmax.quantize_absmax`."""
    absmax = absmax.contiguous()
    codes = absmax.new_empty(absmax.numel(), dtype=torch.uint8)
    nested_absmax = absmax.new_empty(block_count(absmax.numel(), NESTED_BLOCK_SIZE))
    status = _quantize(
        absmax.data_ptr(),
        absmax.numel(),
        offset.data_ptr(),
        _BINS.data_ptr(),
        codes.data_ptr(),
        nested_absmax.data_ptr(),
        threads(),
    )
    check(status, "fb_quantize_absmax")
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
    absmax = codes.new_empty(codes.numel(), dtype=torch.float32)
    status = _dequantize(
        codes.data_ptr(),
        codes.numel(),
        nested_absmax.data_ptr(),
        nested_offset.data_ptr(),
        _MAP.data_ptr(),
        absmax.data_ptr(),
        threads(),
    )
    check(status, "fb_dequantize_absmax")
    return absmax
