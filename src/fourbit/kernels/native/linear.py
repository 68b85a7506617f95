"""Native: products with a quantized weight.

The weight meets x in 4 bits (csrc/kernels/linear.cpp for a few rows of x, linear_many.cpp for more), or it is decoded
and meets x in torch's GEMM, whichever is faster. It is decoded into a workspace that all layers of a thread share: that
grows to the largest weight, and no page of it is fresh from the system again. Where the CPU has no arithmetic in the
type of x, torch's GEMM is an order of magnitude slower than in fp32, and both ways compute in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from fourbit.kernels.native.dequantize import dequantize_blocks
from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, level, threads, workspaces
from fourbit.kernels.native.weight import Weight, point_at, refusal

__all__ = [
    "FEW_ROWS",
    "MANY_ROWS",
    "accepts_linear",
    "accepts_linear_grad_input",
    "is_for_many",
    "kernel_for",
    "linear",
    "linear_grad_input",
]

_ALWAYS = 1 << 62
FEW_ROWS = {
    "scalar": {torch.float32: 4, torch.float16: 8, torch.bfloat16: 8},
    "avx2": {torch.float32: 48, torch.float16: _ALWAYS, torch.bfloat16: _ALWAYS},
    "avx512": {torch.float32: _ALWAYS, torch.float16: _ALWAYS, torch.bfloat16: _ALWAYS},
    "avx512bf16": {torch.float32: _ALWAYS, torch.float16: _ALWAYS, torch.bfloat16: 32},
    "neon": {torch.float32: 8, torch.float16: 8, torch.bfloat16: 8},
}
"""The most rows of x to multiply straight from 4 bits, by SIMD level. Measured on x86 for N x K of 1024 x 1024 to
4096 x 4096, torch limited to the same instructions (ONEDNN_MAX_CPU_ISA); guessed for neon."""

MANY_ROWS = {
    "scalar": {torch.float32: (4, 7), torch.float16: (4, 9), torch.bfloat16: (4, 9)},
    "avx2": {torch.float32: (8, _ALWAYS), torch.float16: (8, _ALWAYS), torch.bfloat16: (8, _ALWAYS)},
    "avx512": {torch.float32: (8, _ALWAYS), torch.float16: (8, _ALWAYS), torch.bfloat16: (8, _ALWAYS)},
    "avx512bf16": {torch.float32: (9, _ALWAYS), torch.float16: (9, _ALWAYS), torch.bfloat16: (9, 128)},
    "neon": {torch.float32: (4, 16), torch.float16: (4, 16), torch.bfloat16: (4, 16)},
}
"""The fewest and the most rows of x for which W is decoded strip by strip into a core's cache, by SIMD level: tried
before `FEW_ROWS`. Measured and guessed likewise, on one thread, the sizes from 576 x 576 to 4096 x 4096."""

_MANY_MULTIPLE = 32
"""What the number of columns must be a multiple of for that."""

_WITHOUT_ARITHMETIC = {
    "scalar": (torch.float16, torch.bfloat16),
    "avx2": (torch.float16, torch.bfloat16),
    "avx512": (torch.float16, torch.bfloat16),
    "avx512bf16": (torch.float16,),
    "neon": (),
}
"""Types of x whose products torch is slow at, by SIMD level."""

_PARAMETERS = [ctypes.POINTER(Weight), POINTER, I32, I64, POINTER, POINTER, I32]
_linear = bind("fb_linear", _PARAMETERS)
_linear_many = bind("fb_linear_many", _PARAMETERS)
_workspaces = workspaces()


def accepts_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> str | None:
    """x of fp32, fp16 or bf16."""
    if x.dtype not in DTYPES:
        return f"it computes in fp32, fp16 or bf16, not {x.dtype}"
    elements = out_features * x.shape[-1]
    return refusal(packed, absmax, nested_absmax, nested_offset, levels, block_size, elements)


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
    *leading, features = x.shape
    dtype = x.dtype
    rows = x.numel() // features if features else 0
    kernel = kernel_for(rows, features, dtype)
    if kernel is None:
        wide = _gemm_dtype(dtype)
        weight = _decoded(
            packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, features, wide
        )
        return torch.nn.functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(dtype)
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    x = x.contiguous()
    y = x.new_empty((*leading, out_features))
    described = point_at(packed, absmax, nested_absmax, nested_offset, levels, block_size, out_features, features)
    status = kernel(
        described,
        x.data_ptr(),
        DTYPES[dtype],
        rows,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        threads(),
    )
    check(status, "fb_linear")
    return y


def kernel_for(rows: int, features: int, dtype: torch.dtype) -> Callable[..., int] | None:
    """What multiplies so many rows of x straight from 4 bits; None where decoding the whole weight is faster."""
    fewest, most = MANY_ROWS[level()][dtype]
    if fewest <= rows <= most and features % _MANY_MULTIPLE == 0:
        return _linear_many
    return _linear if 0 < rows <= FEW_ROWS[level()][dtype] else None


def is_for_many(kernel: Callable[..., int]) -> bool:
    """Whether what `kernel_for` gave is `fb_linear_many`."""
    return kernel is _linear_many


def accepts_linear_grad_input(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    in_features: int,
) -> str | None:
    """A gradient of fp32, fp16 or bf16."""
    return accepts_linear(grad, packed, absmax, nested_absmax, nested_offset, levels, block_size, in_features, None)


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
    wide, rows = _gemm_dtype(grad.dtype), grad.shape[-1]
    weight = _decoded(packed, absmax, nested_absmax, nested_offset, levels, block_size, rows, in_features, wide)
    return (grad.to(wide) @ weight).to(grad.dtype)


def _gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _WITHOUT_ARITHMETIC[level()] else dtype


def _decoded(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """W [rows, cols] in this thread's workspace, where it lasts until the next weight is decoded."""
    size_bytes = rows * cols * dtype.itemsize
    workspace: Tensor | None = getattr(_workspaces, "bytes", None)
    if workspace is None or workspace.numel() < size_bytes:
        # One made within inference mode could not be used by a training step.
        with torch.inference_mode(False):
            workspace = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
        _workspaces.bytes = workspace
    weight = workspace[:size_bytes].view(dtype).view(rows, cols)
    dequantize_blocks(packed, absmax, nested_absmax, nested_offset, levels, block_size, weight)
    return weight
