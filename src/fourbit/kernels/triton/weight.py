"""A quantized weight as the kernels read it: scales, plain or nested, and the two codes of a byte.

Layout (`kernels.ops.dequantize`): the row-major weight is cut into blocks of `block_size` elements with one scale each;
byte i holds the codes of elements 2i (high nibble) and 2i + 1. A block size is even, so a byte never straddles blocks.

The 8-bit map of nested scales lies on the device once. Kernels never contract a product and a sum (`launch.EXACT`), so
a scale decoded here has the bits of the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.formats import NESTED_BLOCK_SIZE, dynamic_map
from fourbit.kernels import dispatch

__all__ = ["load_scales", "nested_map"]

NESTED: tl.constexpr = tl.constexpr(NESTED_BLOCK_SIZE)

_maps: dict[torch.device, Tensor] = {}


def nested_map(device: torch.device) -> Tensor:
    """[256] fp32: the dynamic 8-bit map on a device; made at the first use, so before any graph is captured."""
    if device not in _maps:
        with dispatch.kept_for_all():
            _maps[device] = torch.from_numpy(dynamic_map().copy()).to(device)
    return _maps[device]


@triton.jit
def load_scales(absmax, nested_absmax, nested_offset, nested_map, index, mask, IS_NESTED: tl.constexpr):
    """fp32 scales by their index in the tensor: one load, or the three of a nested scale."""
    if IS_NESTED:
        code = tl.load(absmax + index, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + index // NESTED, mask=mask, other=0.0)
        scale = tl.load(nested_map + code) * outer + tl.load(nested_offset)
    else:
        scale = tl.load(absmax + index, mask=mask, other=0.0)
    return scale
