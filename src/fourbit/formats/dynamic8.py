"""The signed 8-bit dynamic map that holds scales under double quantization.

QLoRA's paper calls it FP8; what bitsandbytes stores, and so what every published checkpoint holds, is a map of 256
floats with seven decades of exponent and a fraction whose width shrinks as the exponent does (8-bit Approximations for
Parallelism in Deep Learning, arXiv:1511.04561).
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["BINS", "dynamic_bins", "dynamic_map"]

BINS = 65536
"""Bins of [-1, 1] by which a value finds its code."""


@cache
def dynamic_map() -> npt.NDArray[np.float32]:
    """[256] fp32 levels, ascending from about -0.993 to 1; code c stands for level c."""
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        # fp32 throughout, as the published map was computed
        bounds = _linspace_fp32(0.1, 1.0, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [float(v) for v in scaled] + [-float(v) for v in scaled]
    return np.array(sorted(values), dtype=np.float32)


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
