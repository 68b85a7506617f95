"""Intervals by resampling what was drawn independently: documents, prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["bootstrap_interval"]


def bootstrap_interval(
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    columns: NDArray[np.float64],
    *,
    samples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of a statistic of column sums.

    Args:
        statistic: [samples, C] sums of the drawn rows to [samples] values: a ratio of sums, say.
        columns: [n, C], one row per independent unit.
        samples: resamples of n rows with replacement.
        level: the share of resampled values inside the interval.
        seed: of the draw; equal seeds and n draw equal rows, which pairs intervals over the same units.

    Returns:
        low, high.
    """
    generator = np.random.default_rng(seed)
    count = len(columns)
    sums = np.empty((samples, columns.shape[1]))
    for sample in range(samples):
        sums[sample] = generator.multinomial(count, np.full(count, 1 / count)) @ columns
    low, high = np.quantile(statistic(sums), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
