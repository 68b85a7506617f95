"""Shares of a reference's score."""

from __future__ import annotations

import pytest

from fourbit.errors import InputError
from fourbit.evaluate import measure_shares
from fourbit.evaluate.ratings import Rating


def scored(first: str, second: str, scores: tuple[float, float] | None, prompt: str = "1") -> Rating:
    return Rating(first, second, 1 if scores else -1, prompt=prompt, scores=scores)


def test_sums_by_order_and_of_both() -> None:
    ratings = [
        scored("ref", "x", (8, 4)),
        scored("ref", "x", (8, 8), "2"),
        scored("x", "ref", (9, 6)),
        scored("x", "ref", None, "2"),
        scored("ref", "y", (10, 5)),
        scored("x", "y", (1, 9)),
    ]
    x, y = measure_shares(ratings, "ref", samples=50)
    assert (x.model, x.reference_first, x.model_first, x.judgements) == ("x", 75.0, 150.0, 3)
    assert x.mean == pytest.approx(100 * 21 / 22)
    assert (y.model, y.reference_first, y.model_first, y.mean) == ("y", 50.0, None, 50.0)
    assert x.low <= x.mean <= x.high
    assert (y.low, y.high) == (50.0, 50.0)


@pytest.mark.parametrize(
    ("ratings", "complaint"),
    [
        ([Rating("ref", "x", 1)], "No rating has scores"),
        ([scored("x", "y", (1, 2))], "No score is against 'ref'; the systems are x, y"),
        ([scored("ref", "x", (0, 2))], "'ref' has only scores of 0"),
    ],
)
def test_nothing_to_share(ratings: list[Rating], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        measure_shares(ratings, "ref")
