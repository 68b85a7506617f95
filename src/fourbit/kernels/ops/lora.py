"""Contract: a quantized linear layer with a low-rank adapter, forward and backward in one piece.

    y = x W^T + bias + s (d(x) A^T) B^T          s = alpha / rank, d = dropout

    dX = dY W + d'(s (dY B) A)
    dA = (s dY B)^T d(x)
    dB = s dY^T (d(x) A^T)

Forming the layer as one operation keeps one copy of the input (autograd over separate products keeps it for the base
and for the adapter), never forms a gradient of W, decodes W anew in the backward pass in place of keeping it, and adds
the adapter's share into the buffer of the base product.

Shapes: x [..., K], W [N, K] in 4 bits, A [R, K], B [N, R], y [..., N]; T tokens in all of the leading dimensions.
Cost: 2TNK + 2TR(N+K) flops forward; the backward pass has no TNK term beyond dX.
Memory between the passes: x (shared with whoever produced it), the [T, R] product of its kept elements with A, and of
dropout a seed: the mask is made anew in the backward pass. d(x) = x * mask / (1 - p), with the factor put on s, so that
nothing but small products is ever scaled.

Source: QLoRA, arXiv:2305.14314, equations 5 and 6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference
from fourbit.kernels.ops.dequantize import check_input

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    levels: Tensor,
    block_size: int,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Multiply by a quantized weight plus its low-rank adapter (see the module's head).

    Args:
        x: [..., K], in the compute dtype.
        packed, absmax, levels, block_size, nested_absmax, nested_offset: W [N, K], see `ops.dequantize`.
        lora_a: [R, K] and
        lora_b: [N, R], in any dtype; products run in the dtype of `x`, gradients come back in the adapter's own.
        scaling: s.
        bias: [N].
        seed: [] or [4] int64 on the CPU, see `kernels.dropout`; None for no dropout.
        dropout: p, the share of the elements of `x` that the adapter does not see; the base product sees all.

    Returns:
        y [..., N], dtype of `x`.

    Raises:
        UnsupportedDtype: `x` holds integers. ValueError: shapes that do not fit, or a seed that is none.
    """
    _check(x, packed, absmax, nested_absmax, block_size, lora_a, lora_b, seed)
    y: Tensor = torch.ops.fourbit.lora_linear(
        x, packed, absmax, nested_absmax, nested_offset, levels, block_size, bias, lora_a, lora_b,
        scaling, seed, dropout,
    )[0]  # fmt: skip
    return y


def _check(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    seed: Tensor | None,
) -> None:
    check_input(x, packed, absmax, nested_absmax, block_size=block_size, out_features=lora_b.shape[0])
    if lora_a.shape[1:] != x.shape[-1:] or lora_b.shape[1:] != lora_a.shape[:1]:
        raise ValueError(
            f"Adapter matrices of shapes {list(lora_a.shape)} and {list(lora_b.shape)} do not fit an input with"
            f" {x.shape[-1]} features; they must be [R, K] and [N, R]."
        )
    if seed is not None and (
        list(seed.shape) not in ([], [4]) or seed.dtype != torch.int64 or seed.device.type not in ("cpu", "meta")
    ):
        raise ValueError(f"The seed of a dropout is one int64 on the CPU, not {list(seed.shape)} of {seed.dtype}.")


def _fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    _check(x, packed, absmax, nested_absmax, block_size, lora_a, lora_b, seed)
    tokens = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], lora_b.shape[0])), x.new_empty((tokens, lora_a.shape[0]))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    xa: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
    needs_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_grad_x else x.new_empty(0)
    return grad_x, torch.empty_like(lora_a), torch.empty_like(lora_b)


_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, Tensor levels, int block_size"
_ADAPTER = "Tensor lora_a, Tensor lora_b, float scaling, Tensor? seed, float dropout"

dispatch.define(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, {_ADAPTER}) -> (Tensor, Tensor)",
    stem="lora",
    reference=reference.lora_linear,
    fake=_fake,
)
dispatch.define(
    f"lora_linear_backward(Tensor grad, Tensor x, Tensor xa, {_WEIGHT}, {_ADAPTER}, bool needs_grad_x)"
    " -> (Tensor, Tensor, Tensor)",
    stem="lora",
    reference=reference.lora_linear_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *weight, block_size, bias, lora_a, lora_b, scaling, seed, dropout = inputs
    ctx.save_for_backward(x, output[1], *weight, lora_a, lora_b, seed)
    ctx.block_size, ctx.scaling, ctx.dropout = block_size, scaling, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    x, xa, *weight, lora_a, lora_b, seed = ctx.saved_tensors
    grad_x, grad_a, grad_b = torch.ops.fourbit.lora_linear_backward(
        grad, x, xa, *weight, ctx.block_size, lora_a, lora_b, ctx.scaling, seed, ctx.dropout, ctx.needs_input_grad[0]
    )
    grad_bias = None
    if ctx.needs_input_grad[7]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    first = grad_x if ctx.needs_input_grad[0] else None
    return first, None, None, None, None, None, None, grad_bias, grad_a, grad_b, None, None, None


torch.library.register_autograd("fourbit::lora_linear", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)


dispatch.refuse_second_derivative("lora_linear_backward")
