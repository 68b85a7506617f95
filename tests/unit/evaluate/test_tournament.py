"""Elo and Bradley-Terry: against their definitions, with what cannot be ranked, and what cannot be told apart."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from fourbit.errors import InputError
from fourbit.evaluate import bradley_terry, elo
from fourbit.evaluate.likelihood import POINTS_PER_UNIT, strengths
from fourbit.evaluate.matches import collect

METHODS = pytest.mark.parametrize("method", [elo, bradley_terry])


def simulated(skills: list[float], prompts: int, seed: int = 0) -> list[tuple[str, str, int, str]]:
    """Every pair in both orders on each prompt, a tie in one of ten."""
    generator = np.random.default_rng(seed)
    matches = []
    for prompt in range(prompts):
        for one, own in enumerate(skills):
            for other, theirs in enumerate(skills):
                if one != other:
                    won = generator.random() < 1 / (1 + math.exp(theirs - own))
                    label = 3 if generator.random() < 0.1 else 1 if won else 2
                    matches.append((f"m{one}", f"m{other}", label, str(prompt)))
    return matches


def plain_elo(matches: list[tuple[str, str, int, str]], orderings: int) -> dict[str, float]:
    """As one would write it down."""
    generator = np.random.default_rng(9)
    totals: dict[str, float] = {}
    for _ in range(orderings):
        ratings: dict[str, float] = {}
        for index in generator.permutation(len(matches)):
            one, other, label, _ = matches[index]
            a, b = ratings.get(one, 1000.0), ratings.get(other, 1000.0)
            change = 32 * ({1: 1.0, 2: 0.0, 3: 0.5}[label] - 1 / (1 + 10 ** ((b - a) / 400)))
            ratings[one], ratings[other] = a + change, b - change
        for model, rating in ratings.items():
            totals[model] = totals.get(model, 0) + rating / orderings
    return totals


def test_elo_is_the_mean_of_plain_tournaments() -> None:
    """Two means over 400 and 4,000 orders: a rating after one order has a deviation of some 30 points, so that the
    difference has 30 sqrt(1/400 + 1/4000) = 1.6; four of them."""
    matches = simulated([0.6, 0.0, -0.6], 30)
    expected = plain_elo(matches, 400)
    for row in elo(matches, orderings=4000, samples=20):
        assert row.elo == pytest.approx(expected[row.model], abs=6.4)


def test_equal_seeds_give_equal_tables() -> None:
    matches = simulated([0.5, 0.0], 20)
    assert elo(matches, orderings=100, samples=50) == elo(matches, orderings=100, samples=50)
    assert elo(matches, orderings=100, samples=50) != elo(matches, orderings=100, samples=50, seed=1)


@METHODS
def test_a_table_says_all_of_a_simulated_tournament(method: Any) -> None:
    matches = simulated([1.5, 0.05, 0.0, -1.5], 60)
    table = method([*matches, ("m0", "m1", -1, "7")], samples=200)
    assert [row.model for row in table][::3] == ["m0", "m3"]
    assert {row.matches for row in table} == {360}
    assert (table.matches, table.prompts, table.dropped, len(table)) == (720, 60, 1, 4)
    assert table.notes == ()
    assert all(row.low < row.elo < row.high for row in table)
    best, near, nearly, last = table
    assert (best.untold, last.untold) == ((), ())
    assert (near.untold, nearly.untold) == ((nearly.model,), (near.model,))
    assert sum(pair.matches for pair in table.pairs) == 720
    assert (table.pairs[0].first, table.pairs[0].second) == (best.model, near.model)
    for pair in table.pairs:
        mine = [row for row in matches if {row[0], row[1]} == {pair.first, pair.second}]
        assert pair.wins == sum(row[2] in (1, 2) and row[row[2] - 1] == pair.first for row in mine)
        assert pair.ties == sum(row[2] == 3 for row in mine)
        assert pair.first_shown == sum(row[0] == pair.first for row in mine)
    assert sum(row.elo for row in table) == pytest.approx(4000, abs=1e-6)


def test_bradley_terry_of_two_models_is_the_log_odds() -> None:
    table = bradley_terry([("a", "b", 1)] * 30 + [("a", "b", 2)] * 10, samples=20)
    difference = table.standings[0].elo - table.standings[1].elo
    assert difference == pytest.approx(400 * math.log10(3), abs=1e-6)
    tied = bradley_terry([("a", "b", 1)] * 10 + [("a", "b", 3)] * 20, samples=20)
    assert tied.standings[0].elo - tied.standings[1].elo == pytest.approx(400 * math.log10(20 / 10), abs=1e-6)


def test_the_likelihood_is_at_its_maximum() -> None:
    """There every model wins as many points as it is expected to, in each of several tournaments."""
    won = np.random.default_rng(3).integers(0, 9, size=(50, 6, 6)).astype(float) + 0.5
    won[:, np.arange(6), np.arange(6)] = 0
    found = strengths(won)
    chance = 1 / (1 + np.exp(found[:, None, :] - found[:, :, None]))
    expected = ((won + won.transpose(0, 2, 1)) * chance).sum(axis=2)
    np.testing.assert_allclose(expected, won.sum(axis=2), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-9)


def test_who_won_everything_is_held_back_and_told_of() -> None:
    table = bradley_terry([("a", "b", 1)] * 8 + [("b", "c", 1), ("b", "c", 2)] * 4, samples=20)
    assert table.standings[0].model == "a"
    assert all(math.isfinite(value) for row in table for value in (row.elo, row.low, row.high))
    assert "no bound" in table.notes[0]
    # 8 wins against a prior of deviation 10: 8 / (1 + e^d) = d / 200 has its root near 5 for a against b
    assert 3.5 < (table.standings[0].elo - table.standings[1].elo) / POINTS_PER_UNIT < 7


@METHODS
@pytest.mark.parametrize(
    ("matches", "complaint"),
    [
        ([], "nothing to rank: there is no rating"),
        ([("a", "b", -1)] * 3, "none of the 3 ratings could be parsed"),
        ([("a", "b", 1), ("b", "c", -1)], "No rating of 'c' could be parsed"),
        ([("a", "b", 1), ("c", "d", 1)], r"2 groups that never met \(a, b; c, d\)"),
        ([("a", "b", 5)], "The label of a match is 5"),
        ([("a", "a", 1)], "'a' cannot play against itself"),
    ],
)
def test_what_cannot_be_ranked(method: Any, matches: list[Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        method(matches)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"orderings": 0}, "orderings is 0"),
        ({"k": 0.0}, "K is 0"),
        ({"k": math.nan}, "K is nan"),
        ({"start": math.inf}, "both finite"),
        ({"matches_per_order": 0}, "matches per order are 0"),
        ({"samples": 1}, "1 resamples give no interval"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        elo([("a", "b", 1)], **options)


def test_models_that_are_asked_for() -> None:
    matches = [("a", "b", 1, "1"), ("b", "c", 1, "1"), ("c", "d", 1, "1")]
    assert collect([*matches], models=["a", "b"]).models == ("a", "b")
    with pytest.raises(InputError, match="No rating speaks of 'x'; the models are a, b, c, d"):
        collect([*matches], models=["a", "x"])
    with pytest.raises(InputError, match="'d' never plays"):
        collect([*matches], models=["a", "b", "d"])
    with pytest.raises(InputError, match="needs two models"):
        collect([*matches], models=["a"])


def test_what_a_reader_is_told() -> None:
    assert "name no prompts" in elo([("a", "b", 1)] * 30, orderings=10, samples=20).notes[0]
    few = elo([("a", "b", 1, "1"), ("b", "a", 1, "2")], orderings=10, samples=20)
    assert few.notes == ("There are 2 prompts only: the intervals are rough.",)
    one_way = elo([("a", "b", 1, str(n)) for n in range(20)], orderings=10, samples=20, matches_per_order=99)
    assert "fewer than the 99" in one_way.notes[0]
    assert "1 of 1 pairs were shown in one order only" in one_way.notes[1]


def test_the_noise_of_few_orders_is_not_in_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resamples of 8 orders give the intervals of resamples of 128.

    A rating after one order has a variance of some 1,750, a rating of resampled prompts one of some 290: 8 orders would
    add 219 to it, which is 32% to the width. A variance of 1,000 draws is off by 4.5%: 23 of 510, which is 4% of the
    width; a quantile of them as much. 10% for two widths.
    """
    from fourbit.evaluate import tournament

    matches = simulated([0.5, 0.2, -0.2, -0.5], 40)
    widths = []
    for orders in (8, 128):
        monkeypatch.setattr(tournament, "FEWEST_ORDERS", orders)
        monkeypatch.setattr(tournament, "MOST_ORDERS", orders)
        table = elo(matches, orderings=100, samples=1000)
        widths.append(np.mean([row.high - row.low for row in table]))
    assert widths[0] == pytest.approx(widths[1], rel=0.1)


def test_two_models_that_are_exactly_alike_are_not_told_apart() -> None:
    """No resample differs, and yet the mean of 100 random orders does: that noise must stay in the interval."""
    matches = [(one, other, 1, str(prompt)) for prompt in range(20) for one, other in ("ab", "ba")]
    for seed in range(5):
        best, _ = elo(matches, orderings=100, samples=50, seed=seed)
        assert len(best.untold) == 1


def test_progress_reaches_its_end() -> None:
    seen: list[tuple[int, int]] = []
    elo(simulated([0.2, 0.0], 20), orderings=50, samples=30, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total in seen)


@pytest.mark.slow
def test_ten_thousand_orders_of_forty_thousand_matches_take_seconds() -> None:
    """Promised are 10 s on two cores."""
    generator = np.random.default_rng(0)
    pairs = [
        (int(a), int((a + d) % 20))
        for a, d in zip(generator.integers(20, size=40_000), generator.integers(1, 20, size=40_000), strict=True)
    ]
    matches = collect([(f"m{a}", f"m{b}", 1 + (a > b), str(n % 500)) for n, (a, b) in enumerate(pairs)])
    began = time.monotonic()
    table = elo(matches)
    assert len(table) == 20
    assert time.monotonic() - began < 10
