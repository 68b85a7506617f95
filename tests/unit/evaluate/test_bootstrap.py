"""Bootstrap intervals against the normal approximation, where that is exact enough."""

from __future__ import annotations

import numpy as np
import pytest

from fourbit.evaluate.bootstrap import bootstrap_interval


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def test_the_mean_of_many_draws() -> None:
    """The interval is mean ± 1.96 s / sqrt(n); a quantile of 4,000 resamples is off by some 4% of its half-width."""
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = bootstrap_interval(mean, np.stack([values, np.ones(400)], axis=1), samples=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_it_is_repeatable_and_its_level_counts() -> None:
    columns = np.stack([np.arange(50.0), np.ones(50)], axis=1)
    assert bootstrap_interval(mean, columns) == bootstrap_interval(mean, columns)
    narrow, wide = bootstrap_interval(mean, columns, level=0.5), bootstrap_interval(mean, columns, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_equal_units_give_a_point() -> None:
    assert bootstrap_interval(mean, np.tile([3.0, 2.0], (7, 1))) == (1.5, 1.5)
