"""Native: a quantized linear layer with a low-rank adapter.

The base product comes from `native.linear`, which decodes W into a reused workspace; the adapter's share is added into
its result by the GEMM itself (`addmm_`), so that the layer makes no temporary larger than [T, R]. For a few rows of x,
where a GEMM's set-up takes longer than its product, csrc/kernels/lora.cpp adds it.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from fourbit.kernels.dropout import keep_mask, share
from fourbit.kernels.native import linear as base
from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads

__all__ = [
    "accepts_lora_linear",
    "accepts_lora_linear_backward",
    "are_few",
    "lora_linear",
    "lora_linear_backward",
]

_FEW_PRODUCTS = 300_000
"""The most products, T R (N + K), for which `fb_lora_add` is faster than two GEMMs. Measured on one thread with AVX-512
for 576 to 4096 features and ranks of 16 and 64."""

_lora_add = bind(
    "fb_lora_add",
    [POINTER, I32, I64, I64, POINTER, POINTER, I32, I64, I64, ctypes.c_float, POINTER, POINTER, I32],
)


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
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.lora`. Returns y and the product of the kept elements with A, [T, R]."""
    out_features = lora_b.shape[0]
    y = base.linear(x, packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, bias)
    if seed is None and are_few(x.numel() // max(x.shape[-1], 1), lora_a, lora_b):
        return y, _add_to_few(y, x.contiguous(), lora_a, lora_b, scaling)
    keep = None if seed is None else keep_mask(x, seed, dropout)
    xa = _kept(x, keep) @ lora_a.to(x.dtype).t()
    y.view(-1, out_features).addmm_(xa, lora_b.to(x.dtype).t(), alpha=share(scaling, seed, dropout))
    return y, xa


def are_few(rows: int, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether `fb_lora_add` adds an adapter's share for so many rows of x."""
    rank, features = lora_a.shape
    products = rows * rank * (features + lora_b.shape[0])
    return (
        0 < products <= _FEW_PRODUCTS
        and lora_a.dtype in DTYPES
        and lora_a.dtype == lora_b.dtype
        and lora_a.is_contiguous()
        and lora_b.is_contiguous()
    )


def _add_to_few(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """Add s (x A^T) B^T to a contiguous y; returns x A^T."""
    rank, features = lora_a.shape
    rows = x.numel() // features
    xa = x.new_empty((rows, rank))
    status = _lora_add(
        x.data_ptr(), DTYPES[x.dtype], rows, features, lora_a.data_ptr(), lora_b.data_ptr(), DTYPES[lora_a.dtype], rank,
        lora_b.shape[0], scaling, xa.data_ptr(), y.data_ptr(), threads(),
    )  # fmt: skip
    check(status, "fb_lora_add")
    return xa


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
    grad_x = base.linear_grad_input(grad, packed, absmax, nested_absmax, nested_offset, levels, block_size, features)
    rows = grad_x.view(-1, features)
    if keep is None:
        rows.addmm_(grad_xa, lora_a.to(grad.dtype))
    else:
        rows.add_((grad_xa @ lora_a.to(grad.dtype)).mul_(keep.view_as(rows)))
    return grad_x, grad_a, grad_b


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """x as [T, K], without what dropout takes; the factor of the rest is in `share`."""
    if keep is not None:
        x = x * keep
    return x.reshape(-1, x.shape[-1])
