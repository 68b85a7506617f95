"""Reference: Elo tournaments, in numpy, whose 64-bit integers wrap as C's do. Every order takes a step at a time."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["elo"]

Words = NDArray[np.uint64]
Numbers = NDArray[np.float64]

GAMMA = 0x9E3779B97F4A7C15
COEFFICIENTS = [math.log(2) ** n / math.factorial(n) for n in range(12)]
"""Of 2^f around 0."""


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
    found = np.empty((len(ends), orders, players))
    begin = 0
    for tournament, end in enumerate(ends.tolist()):
        own = _mixed(_word(seed) + _word(GAMMA) * _word(tournament))
        found[tournament] = _played(
            matches[begin:end].numpy(), players, _states(own, first_order, orders), length, k=k, start=start
        )
        begin = end
    return torch.from_numpy(found)


def _word(value: int) -> Words:
    """An array and no scalar, because numpy warns where a scalar wraps."""
    return np.array([value % 2**64], dtype=np.uint64)


def _mixed(words: Words) -> Words:
    """The finaliser of splitmix64."""
    words = (words ^ (words >> np.uint64(30))) * _word(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * _word(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _states(seed: Words, first_order: int, orders: int) -> Words:
    """Where the stream of each order begins."""
    numbers = np.arange(first_order + 1, first_order + orders + 1, dtype=np.uint64)
    return _mixed(seed + _word(GAMMA) * numbers)


def _played(matches: NDArray[np.int64], players: int, state: Words, length: int, *, k: float, start: float) -> Numbers:
    """[O, P] ratings after one tournament; an order is drawn by Fisher-Yates from the front."""
    count, each = len(matches), np.arange(len(state))
    left = np.tile(matches, (len(state), 1))
    now = np.full((len(state), players), float(start))
    for step in range(min(length, count)):
        state = state + _word(GAMMA)
        high = _mixed(state) >> np.uint64(32)
        drawn = step + ((high * _word(count - step)) >> np.uint64(32)).astype(np.int64)
        match = left[each, drawn]
        left[each, drawn] = left[:, step]
        a, b, points = match & 0x7FFF, (match >> 15) & 0x7FFF, 0.5 * (match >> 30)
        one, other = now[each, a], now[each, b]
        t = np.clip((other - one) * (math.log2(10) / 400), -1000.0, 1000.0)
        change = k * (points - 1.0 / (1.0 + _power_of_two(t)))
        now[each, a] = one + change
        now[each, b] = other - change
    return now


def _power_of_two(t: Numbers) -> Numbers:
    """2^t by the polynomial of the kernel, operation by operation, as libraries differ in the last bit of theirs."""
    whole = np.rint(t)
    fraction = t - whole
    power = np.full_like(t, COEFFICIENTS[-1])
    for coefficient in COEFFICIENTS[-2::-1]:
        power = power * fraction + coefficient
    return np.ldexp(power, whole.astype(np.int32))
