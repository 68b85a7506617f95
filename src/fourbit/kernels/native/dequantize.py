"""Native: decode a quantized weight. csrc/kernels/dequantize.cpp."""

from __future__ import annotations

import ctypes

from torch import Tensor

from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads
from fourbit.kernels.native.weight import Weight, point_at, refusal

__all__ = ["accepts_dequantize_blocks", "dequantize_blocks"]

_dequantize = bind("fb_dequantize", [ctypes.POINTER(Weight), I64, I64, POINTER, I32, I32])


def accepts_dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out: Tensor,
) -> str | None:
    """Contiguous parts, and a contiguous `out` of fp32, fp16 or bf16."""
    if out.dtype not in DTYPES or not out.is_contiguous():
        return f"it writes contiguous fp32, fp16 or bf16, not {out.dtype}"
    return refusal(packed, absmax, nested_absmax, nested_offset, levels, block_size, out.numel())


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
    weight = point_at(packed, absmax, nested_absmax, nested_offset, levels, block_size, 1, elements)
    check(_dequantize(weight, 0, elements, out.data_ptr(), DTYPES[out.dtype], threads()), "fb_dequantize")
