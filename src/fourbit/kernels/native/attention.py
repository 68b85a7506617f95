"""Native: attention. csrc/kernels/attention.cpp and attention_backward.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads, workspaces

__all__ = ["accepts_attention", "accepts_attention_backward", "attention", "attention_backward"]

_MASKS = {**DTYPES, torch.bool: 3}


class _Rows(ctypes.Structure):
    """Mirrors FbRows."""

    _fields_ = (("data", POINTER), ("batch_stride", I64), ("head_stride", I64), ("row_stride", I64))


class _Arguments(ctypes.Structure):
    """Mirrors FbAttention. It holds addresses, so the tensors must outlive the call."""

    _fields_ = (
        *((name, I32) for name in ("dtype", "mask_dtype", "causal")),
        ("scale", ctypes.c_float),
        *((name, I64) for name in ("batch", "heads", "kv_heads", "q_length", "k_length", "qk_size", "v_size")),
        *((name, _Rows) for name in ("q", "k", "v", "mask", "out")),
        ("lse", POINTER),
        *((name, _Rows) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("workspace", POINTER),
    )


_measure = bind("fb_attention_workspace", [POINTER, I32, ctypes.POINTER(I64), I32])
_forward = bind("fb_attention", [POINTER, I32])
_backward = bind("fb_attention_backward", [POINTER, I32])
_workspaces = workspaces()


def accepts_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> str | None:
    """fp32, fp16 and bf16, the last with even head sizes; no empty tensors."""
    if q.dtype not in DTYPES:
        return f"it takes no {q.dtype}"
    given = (q, k, v) if mask is None else (q, k, v, mask)
    if any(x.device != q.device for x in given) or not q.dtype == k.dtype == v.dtype:
        return ", ".join(f"{x.dtype} on {x.device}" for x in given)
    shapes = f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or not (q.numel() and k.numel() and v.numel()):
        return shapes
    batch, kv_heads, _, size = k.shape
    if q.shape[0] != batch or q.shape[1] % kv_heads or q.shape[3] != size or v.shape[:3] != k.shape[:3]:
        return shapes
    if q.dtype == torch.bfloat16 and (size % 2 or v.shape[3] % 2):
        return f"bf16 heads of {size} and {v.shape[3]} elements are not all even"
    if mask is not None and mask.dtype not in _MASKS:
        return f"it takes no mask of {mask.dtype}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.attention`. Returns out and lse."""
    q, k, v = _with_rows(q), _with_rows(k), _with_rows(v)
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3]))
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    arguments, kept = _arguments(q, k, v, mask, out, lse, causal, scale)
    _run(arguments, backward=False)
    del kept
    return out, lse


def accepts_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> str | None:
    """As forward, with what forward gave."""
    if (reason := accepts_attention(q, k, v, mask, causal, scale)) is not None:
        return reason
    batch, heads, queries, _ = q.shape
    if not grad.shape == out.shape == (batch, queries, heads, v.shape[3]) or not grad.dtype == out.dtype == q.dtype:
        return f"the gradient is {list(grad.shape)} of {grad.dtype}, the output {list(out.shape)} of {out.dtype}"
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        return f"lse is {list(lse.shape)} of {lse.dtype}"
    return None


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.ops.attention`. Returns dq, dk, dv, laid out as q, k, v; bit for bit the same on any threads."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows = tuple(_with_rows(x) for x in grads)
    q, k, v, grad, lse = _with_rows(q), _with_rows(k), _with_rows(v), _with_rows(grad), lse.contiguous()
    arguments, kept = _arguments(q, k, v, mask, _with_rows(out), lse, causal, scale)
    arguments.grad_out = _rows(grad.transpose(1, 2))
    arguments.grad_q, arguments.grad_k, arguments.grad_v = (_rows(x) for x in rows)
    _run(arguments, backward=True)
    del kept
    for wanted, written in zip(grads, rows, strict=True):
        if wanted is not written:
            wanted.copy_(written)
    return grads


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[_Arguments, Tensor | None]:
    """What both passes read, and the tensor behind the mask's address."""
    arguments = _Arguments(
        dtype=DTYPES[q.dtype],
        causal=causal,
        scale=scale,
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        q_length=q.shape[2],
        k_length=k.shape[2],
        qk_size=q.shape[3],
        v_size=v.shape[3],
        q=_rows(q),
        k=_rows(k),
        v=_rows(v),
        out=_rows(out.transpose(1, 2)),
        lse=lse.data_ptr(),
    )
    if mask is None:
        return arguments, None
    mask = _with_rows(mask.expand(*mask.shape[:-1], k.shape[2]))
    arguments.mask_dtype = _MASKS[mask.dtype]
    arguments.mask = _rows(mask.expand(*q.shape[:3], k.shape[2]))
    return arguments, mask


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), *x.stride()[:3])


def _with_rows(x: Tensor) -> Tensor:
    """The tensor, or a copy, with the elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(arguments: _Arguments, *, backward: bool) -> None:
    """Call a kernel with a workspace of this thread's, which is kept: fresh memory is slow to fill."""
    count, needed, address = threads(), I64(), ctypes.byref(arguments)
    check(_measure(address, backward, ctypes.byref(needed), count), "fb_attention_workspace")
    kept: Tensor | None = getattr(_workspaces, "bytes", None)
    if kept is None or kept.numel() < needed.value + 63:
        kept = _workspaces.bytes = torch.empty(needed.value + 63, dtype=torch.uint8)
    arguments.workspace = -(-kept.data_ptr() // 64) * 64
    if backward:
        check(_backward(address, count), "fb_attention_backward")
    else:
        check(_forward(address, count), "fb_attention")
