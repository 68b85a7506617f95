"""Layers whose weights are in 4 bits, for any `nn.Module`."""

from fourbit.nn.convert import quantize_module
from fourbit.nn.linear import QuantLinear

__all__ = ["QuantLinear", "quantize_module"]
