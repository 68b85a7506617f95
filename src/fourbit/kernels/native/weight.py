"""A quantized weight as the kernels take it: FbWeight of csrc/fourbit.h."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fourbit.formats import dynamic_map
from fourbit.kernels.native.library import I64, POINTER
from fourbit.kernels.parts import refusal

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
