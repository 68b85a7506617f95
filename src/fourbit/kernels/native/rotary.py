"""Native: rotary position embedding. csrc/kernels/rotary.cpp."""

from __future__ import annotations

import ctypes

from torch import Tensor

from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads

__all__ = ["accepts_rotary", "rotary"]

_Strides = I64 * 3
_STRIDES = ctypes.POINTER(I64)
_MAX_ROTATED = 1024
_rotary = bind(
    "fb_rotary",
    [POINTER, _STRIDES, POINTER, POINTER, I64, I32, I64, I64, I64, I64, I64, I32, POINTER, _STRIDES, I32],
)


def accepts_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> str | None:
    """fp32, fp16 and bf16, up to 1,024 rotated elements."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == cos.dtype == sin.dtype:
        return f"it takes one of fp32, fp16 and bf16 for all, not {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}"
    if q.dim() != 4 or k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        return "q and k are not [B, H, T, D]"
    if cos.dim() != 3 or cos.shape != sin.shape or cos.shape[0] not in (1, q.shape[0]) or cos.shape[1] != q.shape[2]:
        return "cos and sin are not [B or 1, T, D']"
    if cos.shape[2] > min(q.shape[3], _MAX_ROTATED) or cos.shape[2] % 2:
        return f"{cos.shape[2]} elements to rotate are odd, more than {_MAX_ROTATED} or more than the head has"
    return None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.rotary`."""
    cos, sin = cos.contiguous(), sin.contiguous()
    return _rotate(q, cos, sin, inverse), _rotate(k, cos, sin, inverse)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, tokens, head = x.shape
    y = x.new_empty((batch, tokens, heads, head)).transpose(1, 2)
    status = _rotary(
        x.data_ptr(),
        _Strides(*x.stride()[:3]),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        DTYPES[x.dtype],
        batch,
        heads,
        tokens,
        head,
        cos.shape[2],
        inverse,
        y.data_ptr(),
        _Strides(*y.stride()[:3]),
        threads(),
    )
    check(status, "fb_rotary")
    return y
