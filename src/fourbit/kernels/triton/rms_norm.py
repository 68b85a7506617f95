"""Triton: root-mean-square norm.

A program holds one tile of rows in registers: it reads x once, sums in fp32, and writes y. The backward pass finds the
root mean square anew from the same read of x, so that nothing of size [T] is kept between the passes. The gradient of
the weight, which a frozen model never asks for, is summed over the tiles that a program goes through, and then over the
programs by torch: no atomics, so the same bits each time.

Cost: 2 reads or writes of x forward, 3 backward (gradient, x, result).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.rounding import round_to

__all__ = ["accepts_rms_norm", "accepts_rms_norm_backward", "rms_norm", "rms_norm_backward"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE = 2048
"""Elements of a tile where rows are shorter."""
_MAX_COLS = 32768
"""A longer row would spill out of the registers."""
_PROGRAMS = 512
"""What the rows are shared by for the gradient of the weight: a few for every multiprocessor, and 4 K bytes each."""


@triton.jit
def _forward(
    x, weight, y, rows, eps, offset, COLS: tl.constexpr, ROUND: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    col = tl.arange(0, WIDE)
    inside = (row < rows)[:, None] & (col < COLS)[None, :]
    at = row[:, None].to(tl.int64) * COLS + col[None, :]
    values = tl.load(x + at, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    normalised = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / COLS + eps)[:, None]
    if ROUND:
        normalised = round_to(normalised, values.dtype).to(tl.float32)
    scale = tl.load(weight + col, mask=col < COLS, other=0.0).to(tl.float32) + offset
    tl.store(y + at, round_to(normalised * scale[None, :], values.dtype), mask=inside)


@triton.jit
def _backward(
    grad, x, weight, grad_x, sums, rows, tiles, eps, offset,
    COLS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, WIDE)
    scale = tl.load(weight + col, mask=col < COLS, other=0.0).to(tl.float32) + offset
    total = tl.zeros((WIDE,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * TALL + tl.arange(0, TALL)
        inside = (row < rows)[:, None] & (col < COLS)[None, :]
        at = row[:, None].to(tl.int64) * COLS + col[None, :]
        values = tl.load(x + at, mask=inside, other=0.0)
        wide = values.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / COLS + eps)[:, None]
        normalised = wide * inverse
        pulled = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        scaled = pulled * scale[None, :]
        mean = (tl.sum(scaled * normalised, axis=1) / COLS)[:, None]
        tl.store(grad_x + at, round_to(inverse * (scaled - normalised * mean), values.dtype), mask=inside)
        if WEIGHT:
            total += tl.sum(pulled * normalised, axis=0)
    if WEIGHT:
        tl.store(sums + tl.program_id(0) * COLS + col, total, mask=col < COLS)


def accepts_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> str | None:
    """fp32, fp16 and bf16, rows of up to 32,768."""
    return _refusal(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    """See `kernels.ops.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    rows, cols, tall, wide, warps = _tiling(x)
    if rows:
        with guard(x):
            _forward[(triton.cdiv(rows, tall),)](
                x, weight, y, rows, eps, offset, cols, round_first, tall, wide, num_warps=warps, **EXACT
            )
    return y


def accepts_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs_grad_weight: bool
) -> str | None:
    """As forward; the gradient has the shape and dtype of x."""
    if grad.shape != x.shape or grad.dtype != x.dtype:
        return f"the gradient is {list(grad.shape)} of {grad.dtype}"
    return _refusal(x, weight)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight; the latter is empty unless needed."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_x = torch.empty_like(x)
    rows, cols, tall, wide, warps = _tiling(x)
    tiles = triton.cdiv(rows, tall)
    programs = min(tiles, _PROGRAMS) if needs_grad_weight else tiles
    sums = x.new_empty((programs, cols) if needs_grad_weight else 0, dtype=torch.float32)
    if rows:
        with guard(x):
            _backward[(programs,)](
                grad, x, weight, grad_x, sums, rows, tiles, eps, offset, cols, tall, wide, needs_grad_weight,
                num_warps=warps, **EXACT,
            )  # fmt: skip
    return grad_x, sums.sum(dim=0).to(weight.dtype) if needs_grad_weight else weight.new_empty(0)


def _tiling(x: Tensor) -> tuple[int, int, int, int, int]:
    """Rows, columns, the tile's rows and columns (powers of two), and its warps."""
    cols = x.shape[-1]
    wide = triton.next_power_of_2(cols)
    tall = max(1, min(_TILE // wide, 32))
    return x.numel() // cols, cols, tall, wide, min(max(tall * wide // 512, 1), 16)


def _refusal(x: Tensor, weight: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it takes no {x.dtype}"
    if x.dim() == 0 or x.shape[-1] == 0 or weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        return f"the weight is {list(weight.shape)} of {weight.dtype}, x {list(x.shape)} of {x.dtype}"
    return None if x.shape[-1] <= _MAX_COLS else f"a row of {x.shape[-1]} is longer than {_MAX_COLS}"
