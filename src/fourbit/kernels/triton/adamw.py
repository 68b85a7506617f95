"""Triton: a step of AdamW with moments in 8 bits.

One program takes a block of 256 elements, whose moments share a scale: decoded by a look-up, updated, and encoded by
two look-ups each (formats/dynamic8.py), all in registers. Rounding is the reference's, step by step: no fused
multiply-add, a root and divisions that round to nearest. Magnitudes are compared as integers, where NaN is the largest,
so that one shows in its scale.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.formats import STATE_BLOCK_SIZE, dynamic_map, nearest_tables
from fourbit.kernels import dispatch
from fourbit.kernels.moments import check_moments
from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.rounding import round_to, widen

__all__ = ["accepts_adamw_blockwise", "adamw_blockwise"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_tables: dict[torch.device, tuple[Tensor, ...]] = {}


def accepts_adamw_blockwise(
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    *numbers: float,
) -> str | None:
    """fp32, fp16 and bf16."""
    del numbers
    check_moments(exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, params, grads, offsets)
    return f"it takes no {params[0].dtype}" if params and params[0].dtype not in DTYPES else None


def adamw_blockwise(
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """See `kernels.ops.adamw`; one launch for each parameter."""
    kept, step_size, correction = 1 - lr * weight_decay, -lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, kept, step_size, correction, eps)
    tables = _tables_on(exp_avg.device)
    with guard(exp_avg):
        for param, grad, offset in zip(params, grads, offsets, strict=True):
            count, block = param.numel(), offset // STATE_BLOCK_SIZE
            if count:
                _update[(triton.cdiv(count, STATE_BLOCK_SIZE),)](
                    param, grad, exp_avg[offset:], exp_avg_absmax[block:], exp_avg_sq[offset:],
                    exp_avg_sq_absmax[block:], *tables, count, *numbers, BLOCK=STATE_BLOCK_SIZE, num_warps=4, **EXACT,
                )  # fmt: skip


def _tables_on(device: torch.device) -> tuple[Tensor, ...]:
    """Levels, first and middle of the signed and of the unsigned map."""
    if device not in _tables:
        with dispatch.kept_for_all():
            arrays = [
                table
                for signed in (True, False)
                for table in (dynamic_map(signed=signed), *nearest_tables(signed=signed))
            ]
            _tables[device] = tuple(torch.from_numpy(array.copy()).to(device) for array in arrays)
    return _tables[device]


@triton.jit
def _encode(value, first, middle):
    """The scale of a block of fp32 numbers, and their codes."""
    magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(magnitude, axis=0).to(tl.float32, bitcast=True)
    share = tl.math.div_rn(value, tl.where(scale == 0.0, 1.0, scale))
    code = tl.load(first + (share.to(tl.uint32, bitcast=True) >> 16).to(tl.int32)).to(tl.int32)
    code += (share > tl.load(middle + code)).to(tl.int32)
    return scale, code.to(tl.uint8)


@triton.jit
def _update(
    param, grad, m_codes, m_scales, v_codes, v_scales,
    signed_levels, signed_first, signed_middle, unsigned_levels, unsigned_first, unsigned_middle,
    count, beta1, rest1, beta2, rest2, kept, step_size, correction, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    g = widen(tl.load(grad + index, mask=inside, other=0.0))
    p = widen(tl.load(param + index, mask=inside, other=0.0))
    m = tl.load(signed_levels + tl.load(m_codes + index, mask=inside, other=0).to(tl.int32)) * tl.load(m_scales + block)
    v = tl.load(unsigned_levels + tl.load(v_codes + index, mask=inside, other=0).to(tl.int32)) * tl.load(
        v_scales + block
    )
    m = tl.where(inside, m * beta1 + g * rest1, 0.0)
    v = tl.where(inside, v * beta2 + g * g * rest2, 0.0)
    p = (
        p * kept
        + tl.math.div_rn(m, tl.math.div_rn(tl.sqrt_rn(v), tl.full([BLOCK], 1.0, tl.float32) * correction) + eps)
        * step_size
    )
    tl.store(param + index, round_to(p, param.dtype.element_ty), mask=inside)
    m_scale, m_code = _encode(m, signed_first, signed_middle)
    v_scale, v_code = _encode(v, unsigned_first, unsigned_middle)
    tl.store(m_codes + index, m_code, mask=inside)
    tl.store(v_codes + index, v_code, mask=inside)
    tl.store(m_scales + block, m_scale)
    tl.store(v_scales + block, v_scale)
