"""The 8-bit dynamic maps: the signed one holds scales under double quantization, both hold an optimizer's moments.

QLoRA's paper calls it FP8; what bitsandbytes stores, and so what every published checkpoint holds, is a map of 256
floats with seven decades of exponent and a fraction whose width shrinks as the exponent does (8-bit Approximations for
Parallelism in Deep Learning, arXiv:1511.04561). Without a sign the fraction has one bit more.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "STATE_BLOCK_SIZE", "dynamic_bins", "dynamic_map", "nearest_tables"]

BINS = 65536
"""Bins of [-1, 1] by which a value finds its code."""

STATE_BLOCK_SIZE = 256
"""Elements of an optimizer's 8-bit state that share a scale."""


@cache
def dynamic_map(*, signed: bool = True) -> npt.NDArray[np.float32]:
    """[256] fp32 levels, ascending from about -0.993, or from 0, to 1; code c stands for level c."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        # fp32 throughout, as the published map was computed
        bounds = _linspace_fp32(0.1, 1.0, (1 if signed else 2) * 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [float(v) for v in scaled]
        if signed:
            values += [-float(v) for v in scaled]
    return np.array(sorted(values), dtype=np.float32)


@cache
def nearest_tables(*, signed: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Two tables that give the level nearest to a value v of [-1, 1] without a search:

        code = first[upper 16 bits of v];   code += v > middle[code]

    The upper 16 bits of an fp32 number are its sign, its exponent and 7 bits of fraction. Levels lie further apart than
    numbers that share them, so at most one middle between two levels falls among those. Going by bits keeps the small
    levels apart, which even bins do not: half of the second moments of a block are often below 1/65536 of its largest.

    Returns:
        first: [65536] uint8, the code of the smallest number with these upper bits; NaN has some code.
        middle: [256] fp32, half-way between level c and the next; a number there belongs to the lower. The last is
            infinite.
    """
    levels = dynamic_map(signed=signed)
    middle = np.append((levels[:-1].astype(np.float64) + levels[1:]) / 2, np.inf).astype(np.float32)
    upper = np.arange(65536, dtype=np.uint32) << 16
    least = np.where(upper >> 31, upper | 0xFFFF, upper).astype(np.uint32).view(np.float32)  # below 0 the largest bits
    first = np.searchsorted(middle, np.nan_to_num(least, nan=0.0), side="left").astype(np.uint8)
    return first, middle


@cache
def dynamic_bins() -> npt.NDArray[np.uint8]:
    """[65536] uint8: the code that a value in each bin of [-1, 1] takes: the level nearest to the bin's own value.

    A normalised value v falls into bin int((v + 1) / 2 * 65535 + 0.5). Going through bins instead of looking for the
    nearest level changes 0.11% of the codes; it is what bitsandbytes does on a CPU, so files agree to the bit.
    """
    levels = dynamic_map()
    centres = (np.float32(2) * np.arange(BINS, dtype=np.float32) / np.float32(BINS - 1)) - np.float32(1)
    above = np.clip(np.searchsorted(levels, centres, side="left"), 1, len(levels) - 1)
    lower, upper = levels[above - 1], levels[above]
    codes: npt.NDArray[np.uint8] = np.where(centres - lower <= upper - centres, above - 1, above).astype(np.uint8)
    return codes


def _linspace_fp32(start: float, stop: float, count: int) -> npt.NDArray[np.float32]:
    """`torch.linspace` in fp32, to the bit: one rounding per value, the upper half counted from the end."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    lower, upper = np.float64(first) + step * index, np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, lower, upper).astype(np.float32)
