"""Reference: a quantized linear layer with a low-rank adapter, in plain torch."""

from __future__ import annotations

from torch import Tensor

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
    keep: Tensor | None,
    keep_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.lora`. Returns y and d(x) A^T [T, R]."""
    out_features = lora_b.shape[0]
    y = linear(x, packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, bias)
    xa = _dropped(x, keep, keep_scale) @ lora_a.to(x.dtype).t()
    y = y + (xa @ lora_b.to(x.dtype).t() * scaling).view_as(y)
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
    keep: Tensor | None,
    keep_scale: float,
    needs_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.ops.lora`. Returns dX (empty unless needed), dA, dB."""
    flat = grad.reshape(-1, grad.shape[-1])
    grad_xa = flat @ lora_b.to(grad.dtype) * scaling
    grad_a = (grad_xa.t() @ _dropped(x, keep, keep_scale)).to(lora_a.dtype)
    grad_b = (flat.t() @ xa * scaling).to(lora_b.dtype)
    if not needs_grad_x:
        return x.new_empty(0), grad_a, grad_b
    grad_x = linear_grad_input(grad, packed, absmax, nested_absmax, nested_offset, levels, block_size, x.shape[-1])
    through_adapter = (grad_xa @ lora_a.to(grad.dtype)).view(x.shape)
    if keep is not None:
        through_adapter = through_adapter * keep * keep_scale
    return grad_x + through_adapter, grad_a, grad_b


def _dropped(x: Tensor, keep: Tensor | None, keep_scale: float) -> Tensor:
    """d(x) as [T, K]."""
    if keep is not None:
        x = x * keep * keep_scale
    return x.reshape(-1, x.shape[-1])
