"""The 8-bit map of the scales, against bitsandbytes' own and against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from fourbit.formats import dynamic_bins, dynamic_map, nearest_tables
from fourbit.formats.dynamic8 import BINS


def test_the_map_is_bitsandbytes_map() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert np.array_equal(dynamic_map(), functional.create_dynamic_map().numpy())


def test_the_map() -> None:
    levels = dynamic_map()
    assert levels.shape == (256,)
    assert levels.dtype == np.float32
    assert (np.diff(levels) > 0).all()
    assert 0.0 in levels
    assert levels[-1] == 1.0
    # every level but 0 and 1 comes with its negative
    inner = levels[(levels != 0) & (levels != 1)]
    assert np.array_equal(inner, -inner[::-1])


def test_every_bin_takes_the_level_nearest_to_its_value() -> None:
    levels = dynamic_map().astype(np.float64)
    centres = np.linspace(-1, 1, BINS)
    distance = np.abs(centres[:, None] - levels[None, :])
    taken = distance[np.arange(BINS), dynamic_bins()]
    # the bin's value is computed in fp32, so two levels nearly equally far may swap: by two roundings of at most 1
    assert (taken - distance.min(axis=1)).max() <= 2 * 2**-24


def test_bins_ascend_and_reach_every_wide_level() -> None:
    bins = dynamic_bins()
    assert bins.shape == (BINS,)
    assert (np.diff(bins.astype(int)) >= 0).all()
    assert bins[0] == 0
    assert bins[-1] == 255
    # levels closer together than two bins cannot all be reached: those are the 0.11% of codes that are not the nearest
    assert 200 < len(np.unique(bins)) <= 256


def test_how_often_bins_miss_the_nearest_level() -> None:
    """0.11% of codes differ from the nearest level, for values spread evenly over [-1, 1]."""
    levels = dynamic_map().astype(np.float64)
    values = np.random.default_rng(0).uniform(-1, 1, 200_000).astype(np.float32)
    codes = dynamic_bins()[((values + 1) * np.float32(0.5) * np.float32(BINS - 1) + np.float32(0.5)).astype(np.int32)]
    above = np.clip(np.searchsorted(levels, values), 1, 255)
    nearest = np.where(values - levels[above - 1] <= levels[above] - values, above - 1, above)
    share = (codes != nearest).mean()
    deviation = np.sqrt(0.0011 * (1 - 0.0011) / len(values))
    assert abs(share - 0.0011) <= 5e-5 + 5 * deviation  # the published figure has two digits


@pytest.mark.parametrize("signed", [True, False])
def test_two_tables_find_the_nearest_level_of_every_kind_of_number(signed: bool) -> None:
    """Around every level and every middle, at each power of ten, and for the smallest numbers there are."""
    levels = dynamic_map(signed=signed)
    first, middle = nearest_tables(signed=signed)
    ends = np.concatenate([levels, middle[:-1]])
    drawn = np.random.default_rng(0).random(200_000) ** np.random.default_rng(1).integers(1, 20, 200_000)
    values = np.concatenate(
        [ends, np.nextafter(ends, np.float32(-9)), np.nextafter(ends, np.float32(9)), drawn, [1e-45]]
    )
    values = np.concatenate([values, -values]) if signed else np.abs(values)
    values = np.clip(values, levels[0], 1).astype(np.float32)
    codes = first[values.view(np.uint32) >> 16].astype(np.int64)
    codes += values > middle[codes]
    assert np.array_equal(codes, np.searchsorted(middle, values, side="left"))


@pytest.mark.parametrize("signed", [True, False])
def test_no_two_middles_share_their_upper_bits(signed: bool) -> None:
    """Or one comparison would not be enough."""
    _, middle = nearest_tables(signed=signed)
    upper = middle[:-1].view(np.uint32) >> 16
    assert len(set(upper.tolist())) == 255


def test_any_bits_give_a_code() -> None:
    """A table is read with the upper bits of whatever a gradient was."""
    for signed in (True, False):
        first, middle = nearest_tables(signed=signed)
        assert (first.shape, first.dtype, middle.shape) == ((65536,), np.uint8, (256,))
        assert np.isinf(middle[255])
