"""The codebooks: the published constants, where they come from, and how a value finds its code."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import norm

from fourbit.errors import UnknownFormat
from fourbit.formats import CODEBOOKS, FP4, INT4, NF2, NF3, NF4, Codebook, codebook, normal_float

BOOKS = [*CODEBOOKS.values(), normal_float(12), normal_float(5)]


def names(book: Codebook) -> str:
    return book.name


def test_nf4_is_derived_from_the_normal_distribution() -> None:
    derived = normal_float(16)
    assert np.abs(derived.table.astype(np.float64) - NF4.table).max() <= 2.3e-7
    assert np.abs(np.array(derived.levels) - np.array(NF4.levels)).max() > 0, "then the constants need not be kept"


@pytest.mark.parametrize("levels", range(3, 17))
def test_normal_float_of_any_size(levels: int) -> None:
    book = normal_float(levels)
    assert len(book.levels) == levels
    assert list(book.levels) == sorted(set(book.levels))
    assert (min(book.levels), max(book.levels)) == (-1.0, 1.0)
    assert 0.0 in book.levels, "zero must be exact"
    assert sum(level > 0 for level in book.levels) == levels // 2


@pytest.mark.parametrize("levels", [3, 4, 8, 16])
def test_normal_float_is_what_the_paper_says(levels: int) -> None:
    """Against scipy's quantiles; ours come from the standard library, good to 1e-15 relative."""
    offset = 1 - (1 / (2 * levels) + 1 / (2 * (levels - 1))) / 2
    positives = norm.ppf(np.linspace(offset, 0.5, levels // 2 + 1)[:-1])
    negatives = -norm.ppf(np.linspace(offset, 0.5, levels - levels // 2)[:-1])
    expected = np.sort([*positives, 0.0, *negatives]) / positives.max()
    # one rounding to fp32 of values of at most 1
    assert np.abs(np.array(normal_float(levels).levels) - expected).max() <= 2**-25


def test_the_offset_of_the_released_code() -> None:
    offset = 1 - (1 / 32 + 1 / 30) / 2
    assert offset == pytest.approx(0.9677083, abs=5e-8)
    scale = NormalDist().inv_cdf(offset)
    assert scale == pytest.approx(1.8481308, abs=1e-6), "the largest quantile, by which all are divided"


@pytest.mark.parametrize("levels", [2, 17])
def test_normal_float_out_of_range(levels: int) -> None:
    with pytest.raises(ValueError, match=f"3 to 16 levels, not {levels}"):
        normal_float(levels)


def test_fp4_is_e2m1() -> None:
    """Sign, two bits of exponent, one of mantissa, in the order of bitsandbytes, over the largest."""
    magnitudes = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    expected = np.array(magnitudes + [-m for m in magnitudes], dtype=np.float32) / np.float32(12)
    assert np.array_equal(FP4.table, expected)
    assert FP4.table[[0, 8]].tolist() == [0.0, 0.0]


def test_int4_is_the_symmetric_grid() -> None:
    assert len(INT4.levels) == 15
    assert np.array_equal(INT4.table[:15], np.arange(-7, 8, dtype=np.float32) / np.float32(7))


@pytest.mark.parametrize("book", BOOKS, ids=names)
def test_tables_are_padded_to_sixteen(book: Codebook) -> None:
    count = len(book.levels)
    assert book.table.shape == book.ranked_codes.shape == (16,)
    assert book.thresholds.shape == (15,)
    assert (book.table[count:] == np.float32(book.levels[-1])).all()
    assert np.isinf(book.thresholds[count - 1 :]).all()
    assert np.isfinite(book.thresholds[: count - 1]).all()
    assert sorted(book.ranked_codes[:count]) == list(range(count))


@pytest.mark.parametrize("book", BOOKS, ids=names)
def test_a_tie_takes_the_lower_level(book: Codebook) -> None:
    ascending = book.table[list(book.order)]
    for rank, threshold in enumerate(book.thresholds[: len(book.levels) - 1]):
        at, above = np.float32(threshold), np.nextafter(np.float32(threshold), np.float32(2))
        assert int((book.thresholds < at).sum()) == rank
        assert int((book.thresholds < above).sum()) > rank
        assert ascending[rank] <= at <= ascending[rank + 1]


def test_the_zeros_of_fp4_are_told_apart_as_bitsandbytes_does() -> None:
    """From below and at 0 a value takes the first zero in sorted order, from above the second."""
    tiny = np.float32(1e-3) / 12
    codes = [int(FP4.ranked_codes[int((FP4.thresholds < v).sum())]) for v in (-tiny, np.float32(0), tiny)]
    assert codes == [0, 0, 8]
    assert FP4.zero_code == 0


@pytest.mark.parametrize("book", [NF4, NF3, NF2, INT4], ids=names)
def test_zero_code(book: Codebook) -> None:
    assert book.table[book.zero_code] == 0


def test_lookup() -> None:
    assert codebook("nf4") is NF4
    with pytest.raises(UnknownFormat, match=r"no 4-bit format named 'NF-4'.*nf4, fp4, int4, nf3, nf2.*you mean nf4"):
        codebook("NF-4")
    with pytest.raises(UnknownFormat, match=r"nf2\.$"):
        codebook("gguf")


def test_a_codebook_defends_itself() -> None:
    with pytest.raises(ValueError, match="2 to 16 levels"):
        Codebook("one", (0.0,))
    with pytest.raises(ValueError, match="not a permutation"):
        Codebook("order", (0.0, 1.0), order=(0, 0))
    with pytest.raises(ValueError, match=r"ascend along its order within \[-1, 1\]"):
        Codebook("wide", (0.0, 2.0))
    with pytest.raises(ValueError, match="ascend"):
        Codebook("reversed", (0.0, 1.0), order=(1, 0))
