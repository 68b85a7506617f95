"""Reference: a quantized linear layer with a low-rank adapter, in plain torch."""

from __future__ import annotations

from torch import Tensor

from fourbit.kernels.dropout import keep_mask, share
from fourbit.kernels.reference.linear import linear, linear_grad_input

__all__ = ["lora_linear", "lora_linear_backward"]


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
    y = linear(x, packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, bias)
    keep = None if seed is None else keep_mask(x, seed, dropout)
    xa = _kept(x, keep) @ lora_a.to(x.dtype).t()
    y = y + (xa @ lora_b.to(x.dtype).t() * share(scaling, seed, dropout)).view_as(y)
    return y, xa


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
    grad_xa = flat @ lora_b.to(grad.dtype) * factor
    grad_a = (grad_xa.t() @ _kept(x, keep)).to(lora_a.dtype)
    grad_b = (flat.t() @ xa * factor).to(lora_b.dtype)
    if not needs_grad_x:
        return x.new_empty(0), grad_a, grad_b
    grad_x = linear_grad_input(grad, packed, absmax, nested_absmax, nested_offset, levels, block_size, x.shape[-1])
    through_adapter = (grad_xa @ lora_a.to(grad.dtype)).view(x.shape)
    if keep is not None:
        through_adapter = through_adapter * keep
    return grad_x + through_adapter, grad_a, grad_b


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """x as [T, K], without what dropout takes; the factor of the rest is in `share`."""
    if keep is not None:
        x = x * keep
    return x.reshape(-1, x.shape[-1])
