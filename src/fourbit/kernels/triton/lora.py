"""Triton: a quantized linear layer with a low-rank adapter.

The adapter's share s (d(x) A^T) B^T + bias is written first, by a product over the rank alone, and the base product
adds to it where it ends: in the registers of `matvec` and `skinny`, or as the C of cuBLAS's D = A B + C. So y is
written twice and read once, the reading beside the base product's arithmetic. Backward it is the same: s (dY B) A
first, and dY W is added to it.

(Adding s B A to the decoded W would save those passes, but round the adapter's small numbers to the spacing of the
weight's: a step of training would be lost.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels.dropout import keep_mask, share
from fourbit.kernels.triton import linear as base

__all__ = [
    "accepts_lora_linear",
    "accepts_lora_linear_backward",
    "lora_linear",
    "lora_linear_backward",
]


def accepts_lora_linear(
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
    *_: object,
) -> str | None:
    """What `triton.linear` takes."""
    out_features = lora_b.shape[0]
    return base.accepts_linear(x, packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, bias)


def lora_linear(
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
    """See `kernels.ops.lora`. Returns y and the product of the kept elements with A, [T, R]."""
    out_features = lora_b.shape[0]
    keep, factor = None if seed is None else keep_mask(x, seed, dropout), share(scaling, seed, dropout)
    xa = _kept(x, keep) @ lora_a.to(x.dtype).t()
    b = lora_b.to(x.dtype).t()
    first = (xa * factor) @ b if bias is None else torch.addmm(bias.to(x.dtype), xa, b, alpha=factor)
    weight = (packed, absmax, nested_absmax, nested_offset, levels, block_size)
    return base.multiply(x, weight, out_features, first.view(*x.shape[:-1], out_features)), xa


def accepts_lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    xa: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    *_: object,
) -> str | None:
    """What `triton.linear_grad_input` takes."""
    features = x.shape[-1]
    return base.accepts_linear_grad_input(
        grad, packed, absmax, nested_absmax, nested_offset, levels, block_size, features
    )


def lora_linear_backward(
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
    """See `kernels.ops.lora`. Returns dX (empty unless needed), dA, dB."""
    flat = grad.reshape(-1, grad.shape[-1])
    keep, factor = None if seed is None else keep_mask(x, seed, dropout), share(scaling, seed, dropout)
    grad_xa = (flat @ lora_b.to(grad.dtype)).mul_(factor)
    grad_a = (grad_xa.t() @ _kept(x, keep)).to(lora_a.dtype)
    grad_b = (flat.t() @ xa).mul_(factor).to(lora_b.dtype)
    if not needs_grad_x:
        return x.new_empty(0), grad_a, grad_b
    features = x.shape[-1]
    grad_x = grad_xa @ lora_a.to(grad.dtype)
    if keep is not None:
        grad_x.mul_(keep.reshape(-1, features))
    weight = (packed, absmax, nested_absmax, nested_offset, levels, block_size)
    grad_x.addmm_(flat, base.decode(weight, flat.shape[-1], features, grad.dtype))
    return grad_x.view(x.shape), grad_a, grad_b


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """x as [T, K], without what dropout takes; the factor of the rest is in `share`."""
    if keep is not None:
        x = x * keep
    return x.reshape(-1, x.shape[-1])
