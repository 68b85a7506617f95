"""Quantities as people read them."""

from __future__ import annotations

import pytest

from fourbit.errors import InputError
from fourbit.words import duration, parse_size, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (12_345, "12.3 kB"),
        (1_044_992, "1.0 MB"),
        (123_456_789, "123 MB"),
        (3.3e9, "3.3 GB"),
        (5e13, "50,000 GB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("24 GB", 24 * 10**9),
        (" 24g ", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("0.5T", 5 * 10**11),
        (".5 kib", 512),
        ("512", 512),
        (512, 512),
        ("512 bytes", 512),
        ("1e6", 10**6),
        (1.5e3, 1500),
    ],
)
def test_sizes_are_read(text: str | float, count: int) -> None:
    assert parse_size(text, "`memory`") == count


@pytest.mark.parametrize(
    "text", ["", "GB", "24XB", "24 i", "-1", "1,5GB", "1GB2", "1e999", "9" * 400, "nan", "inf", True, "0", "0.1"]
)
def test_what_is_no_size_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match=r"^`memory` is .*(write 24GB, 24GiB or 0.5T, say|above 0 bytes)\.$"):
        parse_size(text, "`memory`")
