"""A quantized weight as the kernels take it: FbWeight of csrc/fourbit.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fourbit.formats import NESTED_BLOCK_SIZE, dynamic_map
from fourbit.kernels.native.library import I64, POINTER

__all__ = ["Weight", "point_at", "refusal"]

_MAP = torch.from_numpy(dynamic_map())
_MAP_ADDRESS = _MAP.data_ptr()


class Weight(ctypes.Structure):
    """Mirrors FbWeight. It holds addresses, so the tensors must outlive the call."""

    _fields_ = (
        ("packed", POINTER),
        ("absmax", POINTER),
        ("absmax_codes", POINTER),
        ("nested_absmax", POINTER),
        ("nested_offset", POINTER),
        ("nested_map", POINTER),
        ("levels", POINTER),
        ("rows", I64),
        ("cols", I64),
        ("block_size", I64),
    )


def refusal(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    elements: int,
) -> str | None:
    """Why the kernels cannot read these parts; None if they can. A kernel trusts its sizes: here they are checked."""
    blocks = -(-elements // block_size)
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != (elements + 1) // 2:
        return f"the packed codes are not {(elements + 1) // 2} contiguous bytes"
    if not absmax.is_contiguous() or absmax.numel() != blocks:
        return f"there are not {blocks} contiguous scales"
    if levels.dtype != torch.float32 or levels.numel() != 16 or not levels.is_contiguous():
        return "the codebook is not 16 contiguous fp32 levels"
    if nested_absmax is None or nested_offset is None:
        return None if absmax.dtype == torch.float32 else f"plain scales are fp32, not {absmax.dtype}"
    if absmax.dtype != torch.uint8 or nested_absmax.dtype != torch.float32 or nested_offset.dtype != torch.float32:
        return "nested scales are uint8 codes with an fp32 absmax and offset"
    if nested_absmax.numel() != -(-blocks // NESTED_BLOCK_SIZE) or not nested_absmax.is_contiguous():
        return f"there is not one contiguous second-level scale per {NESTED_BLOCK_SIZE} scales"
    return None


def point_at(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    rows: int,
    cols: int,
) -> Weight:
    """The addresses of the parts of a weight [rows, cols]; see `kernels.ops.dequantize` for the two forms of scales."""
    first, nested = absmax.data_ptr(), nested_absmax is not None and nested_offset is not None
    return Weight(
        packed.data_ptr(),
        None if nested else first,
        first if nested else None,
        nested_absmax.data_ptr() if nested_absmax is not None else None,
        nested_offset.data_ptr() if nested_offset is not None else None,
        _MAP_ADDRESS,
        levels.data_ptr(),
        rows,
        cols,
        block_size,
    )
