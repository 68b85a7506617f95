"""Quantized tensors: configuration, the tensor itself, and its layout on disk.

`QuantConfig` needs no torch, so what does is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourbit.quant.config import QuantConfig

if TYPE_CHECKING:
    from fourbit.quant.tensor import QuantizedTensor, quantize

__all__ = ["QuantConfig", "QuantizedTensor", "quantize"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'fourbit.quant' has no attribute {name!r}")
    from fourbit.quant import tensor

    return getattr(tensor, name)
