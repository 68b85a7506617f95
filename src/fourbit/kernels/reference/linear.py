"""Reference: products with a quantized weight, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels.reference.dequantize import decode

__all__ = ["linear", "linear_grad_input"]


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """See `kernels.ops.linear.linear`."""
    shape = (out_features, x.shape[-1])
    weight = decode(packed, absmax, nested_absmax, nested_offset, levels, block_size, shape, _value_dtype(x)).to(
        x.dtype
    )
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_grad_input(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    in_features: int,
) -> Tensor:
    """The gradient that reaches the input of `linear`: dX = dY W, [..., N] to [..., K]."""
    shape = (grad.shape[-1], in_features)
    weight = decode(packed, absmax, nested_absmax, nested_offset, levels, block_size, shape, _value_dtype(grad))
    return grad @ weight.to(grad.dtype)


def _value_dtype(x: Tensor) -> torch.dtype:
    """fp64 inputs, which only gradient checks use, meet the fp32 weight."""
    return torch.float32 if x.dtype == torch.float64 else x.dtype
