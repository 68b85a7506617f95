"""Native: a quantized linear layer with a low-rank adapter.

The base product comes from `native.linear`, which decodes W into a reused workspace; the adapter's share is added into
its result by the GEMM itself (`addmm_`), so that the layer makes no temporary larger than [T, R].
"""

from __future__ import annotations

from torch import Tensor

from fourbit.kernels.native import linear as base

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
    """What `native.linear` takes."""
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
    keep: Tensor | None,
    keep_scale: float,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.lora`. Returns y and d(x) A^T [T, R]."""
    out_features = lora_b.shape[0]
    y = base.linear(x, packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, bias)
    xa = _dropped(x, keep, keep_scale) @ lora_a.to(x.dtype).t()
    y.view(-1, out_features).addmm_(xa, lora_b.to(x.dtype).t(), alpha=scaling)
    return y, xa


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
    """What `native.linear_grad_input` takes."""
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
    keep: Tensor | None,
    keep_scale: float,
    needs_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.ops.lora`. Returns dX (empty unless needed), dA, dB."""
    flat = grad.reshape(-1, grad.shape[-1])
    grad_xa = (flat @ lora_b.to(grad.dtype)).mul_(scaling)
    grad_a = (grad_xa.t() @ _dropped(x, keep, keep_scale)).to(lora_a.dtype)
    grad_b = (flat.t() @ xa).mul_(scaling).to(lora_b.dtype)
    if not needs_grad_x:
        return x.new_empty(0), grad_a, grad_b
    features = x.shape[-1]
    grad_x = base.linear_grad_input(grad, packed, absmax, nested_absmax, nested_offset, levels, block_size, features)
    rows = grad_x.view(-1, features)
    if keep is None:
        rows.addmm_(grad_xa, lora_a.to(grad.dtype))
    else:
        rows.add_((grad_xa @ lora_a.to(grad.dtype)).mul_(keep.view_as(rows)), alpha=keep_scale)
    return grad_x, grad_a, grad_b


def _dropped(x: Tensor, keep: Tensor | None, keep_scale: float) -> Tensor:
    """d(x) as [T, K]."""
    if keep is not None:
        x = x * keep * keep_scale
    return x.reshape(-1, x.shape[-1])
