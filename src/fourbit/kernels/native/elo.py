"""Native: Elo tournaments in random orders. csrc/kernels/elo.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fourbit.kernels.native.library import I32, I64, POINTER, bind, check, threads

__all__ = ["accepts_elo", "elo"]

_U64, _F64 = ctypes.c_uint64, ctypes.c_double
_elo = bind("fb_elo", [POINTER, POINTER, I64, I64, I64, I64, I64, _U64, _F64, _F64, POINTER, I32])


def accepts_elo(
    matches: Tensor,
    ends: Tensor,
    players: int,
    orders: int,
    first_order: int,
    length: int,
    seed: int,
    k: float,
    start: float,
) -> str | None:
    """Everything that the contract allows."""
    return None


def elo(
    matches: Tensor,
    ends: Tensor,
    players: int,
    orders: int,
    first_order: int,
    length: int,
    seed: int,
    k: float,
    start: float,
) -> Tensor:
    """See `kernels.ops.elo`."""
    packed = matches.to(torch.uint32)
    ends = ends.contiguous()
    ratings = torch.empty((len(ends), orders, players), dtype=torch.float64)
    status = _elo(
        packed.data_ptr(),
        ends.data_ptr(),
        len(ends),
        players,
        orders,
        first_order,
        length,
        seed % 2**64,
        k,
        start,
        ratings.data_ptr(),
        threads(),
    )
    check(status, "fb_elo")
    return ratings
