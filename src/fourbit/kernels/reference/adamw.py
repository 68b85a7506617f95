"""Reference: a step of AdamW with moments in 8 bits."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fourbit.formats import STATE_BLOCK_SIZE, dynamic_map, nearest_tables
from fourbit.kernels.dispatch import kept_for_all
from fourbit.kernels.moments import check_moments

__all__ = ["adamw_blockwise", "decode_moment", "encode_moment"]


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
    """See `kernels.ops.adamw`; every product, sum, quotient and root is rounded to fp32."""
    check_moments(exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, params, grads, offsets)
    first, second = 1 - beta1**step, math.sqrt(1 - beta2**step)
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        count = param.numel()
        block = offset // STATE_BLOCK_SIZE
        elements = slice(offset, offset + count)
        blocks = slice(block, block - (-count // STATE_BLOCK_SIZE))
        g = grad.flatten().float()
        m = decode_moment(exp_avg[elements], exp_avg_absmax[blocks], signed=True) * beta1 + g * (1 - beta1)
        v = decode_moment(exp_avg_sq[elements], exp_avg_sq_absmax[blocks], signed=False) * beta2
        v = v + g * g * (1 - beta2)
        p = param.flatten().float() * (1 - lr * weight_decay)
        root = v.double().sqrt().float()  # in fp32 MKL's, which torch calls, is off by a bit for a fifth of all numbers
        p = p + m / (root / _like(second, v) + eps) * (-lr / first)
        param.copy_(p.view_as(param))
        exp_avg[elements], exp_avg_absmax[blocks] = encode_moment(m, signed=True)
        exp_avg_sq[elements], exp_avg_sq_absmax[blocks] = encode_moment(v, signed=False)


def decode_moment(codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
    """[n] uint8 codes with [ceil(n/256)] fp32 scales as [n] fp32."""
    levels, _, _ = _tables(codes.device, signed)
    return levels[codes.int()] * absmax.repeat_interleave(STATE_BLOCK_SIZE)[: codes.numel()]


def encode_moment(moment: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """[n] fp32 as [n] uint8 codes of the nearest levels, and [ceil(n/256)] fp32 scales."""
    _, first, middle = _tables(moment.device, signed)
    padding = -moment.numel() % STATE_BLOCK_SIZE
    blocks = torch.nn.functional.pad(moment, (0, padding)).view(-1, STATE_BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=1)
    shares = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    upper = (shares.view(torch.int32) >> 16) & 0xFFFF
    codes = first[upper].int()
    codes = codes + (shares > middle[codes])
    return codes.to(torch.uint8).view(-1)[: moment.numel()], absmax


def _like(number: float, tensor: Tensor) -> Tensor:
    """As a tensor: torch divides by a Python number on a GPU by multiplying with its reciprocal."""
    return torch.full((), number, dtype=tensor.dtype, device=tensor.device)


@cache
def _tables(device: torch.device, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The levels, and the two tables of `nearest_tables`."""
    with kept_for_all():
        first, middle = nearest_tables(signed=signed)
        levels = torch.from_numpy(dynamic_map(signed=signed).copy())
        return levels.to(device), torch.from_numpy(first.copy()).to(device), torch.from_numpy(middle.copy()).to(device)
