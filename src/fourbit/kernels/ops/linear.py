"""Contract: a linear layer whose weight is in 4 bits. The weight never gets a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference
from fourbit.kernels.ops.dequantize import check_input

__all__ = ["linear"]


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    levels: Tensor,
    block_size: int,
    out_features: int,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply by a quantized weight: y = x W^T + bias.

    Args:
        x: [..., K], in the compute dtype.
        packed, absmax, levels, block_size, nested_absmax, nested_offset: W [N, K], see `ops.dequantize`.
        out_features: N.
        bias: [N].

    Returns:
        [..., N], dtype of `x`.

    Backward: dX = dY W with W decoded anew; dbias = sum dY. No gradient of W is formed.

    Error: a backend may accumulate in another order and scale after instead of before the sum; against the exact
    product |y - y*| <= (eps_w + K eps_32) sum |x||w| + eps_y |y*|, where eps_w is the rounding of a weight to the
    compute dtype (2^-8 for bf16: the level and the product may each be rounded) and eps_y that of the result.
    """
    check_input(x, packed, absmax, nested_absmax, block_size=block_size, out_features=out_features)
    y: Tensor = torch.ops.fourbit.linear(
        x, packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, bias
    )
    return y


def _fake(
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
    check_input(x, packed, absmax, nested_absmax, block_size=block_size, out_features=out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_grad_input(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    in_features: int,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor levels, int block_size"

dispatch.define(
    f"linear(Tensor x, {_WEIGHT}, SymInt out_features, Tensor? bias) -> Tensor",
    stem="linear",
    reference=reference.linear,
    fake=_fake,
)
dispatch.define(
    f"linear_grad_input(Tensor grad, {_WEIGHT}, SymInt in_features) -> Tensor",
    stem="linear",
    reference=reference.linear_grad_input,
    fake=_fake_grad_input,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight, block_size, _, bias = inputs
    ctx.save_for_backward(*weight)
    ctx.block_size, ctx.in_features = block_size, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.fourbit.linear_grad_input(grad, *ctx.saved_tensors, ctx.block_size, ctx.in_features)
    if ctx.needs_input_grad[8]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, None, None, None, grad_bias


def _setup_grad_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, *weight, block_size, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.block_size, ctx.out_features = block_size, grad.shape[-1]


def _grad_input_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dX = dY W is linear in dY, so its own gradient is the forward product."""
    through = torch.ops.fourbit.linear(grad, *ctx.saved_tensors, ctx.block_size, ctx.out_features, None)
    return (through, *[None] * 7)


torch.library.register_autograd(
    "fourbit::linear_grad_input",
    _grad_input_backward,
    setup_context=_setup_grad_input_context,
    lib=dispatch.LIBRARY,
)
torch.library.register_autograd("fourbit::linear", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
