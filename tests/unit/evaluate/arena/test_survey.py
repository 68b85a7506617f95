"""What the organiser is told, and what is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fourbit.errors import OutputExists
from fourbit.evaluate import bradley_terry, measure_agreement, read_ratings
from fourbit.evaluate.arena.ballots import Choice
from fourbit.evaluate.arena.store import Store
from fourbit.evaluate.arena.survey import take_survey
from fourbit.evaluate.arena.votes import export_votes, rating
from fourbit.evaluate.raters import read_raters

Make = Callable[..., Store]


def prefer(store: Store, rater: str, better: str, *, most: int = 1000, tie_every: int = 0) -> None:
    """Vote for one system wherever it is, as somebody would who knows."""
    for number in range(most):
        showing = store.next(rater)
        if showing is None:
            return
        choice: Choice = "A" if showing.first.startswith(better) else "B"
        if not any(text.startswith(better) for text in (showing.first, showing.second)):
            choice = "tie"
        if tie_every and number % tie_every == 0:
            choice = "both bad"
        store.vote(rater, showing.ticket, choice)


def test_nothing_yet(arena: Make) -> None:
    found = take_survey(arena(prompts=3))
    assert (found.votes, found.pairs, found.covered, found.shared) == (0, 3, 0, 0)
    assert (found.shown_first, found.fleiss, found.shares, found.ranking) == (None, None, (), ())
    assert [(one.rater, one.done, one.left, one.median_seconds) for one in found.raters] == [
        ("anna", 0, 3, None),
        ("ben", 0, 3, None),
    ]


def test_the_numbers_are_those_of_elo_and_agreement(arena: Make) -> None:
    store = arena(systems="abc", prompts=10)
    prefer(store, "anna", "a", tie_every=4)
    prefer(store, "ben", "b", most=12)
    found = take_survey(store, samples=50)
    assert (found.votes, found.pairs, found.covered, found.shared) == (42, 30, 30, 12)
    assert [(one.done, one.left) for one in found.raters] == [(30, 0), (12, 18)]
    assert found.raters[0].choices["both bad"] == 8
    ratings = [rating(vote) for vote in store.votes()]
    ranking = bradley_terry(ratings, samples=50)
    assert [row["model"] for row in found.ranking] == [row.model for row in ranking]
    assert [row["elo"] for row in found.ranking] == [row.elo for row in ranking]
    for share in found.shares:
        own = [one for one in ratings if {one.first, one.second} == {share.first, share.second}]
        assert share.wins + share.ties + share.losses == len(own)
        points = sum(0.5 if one.label == 3 else (one.label == 1) == (one.first == share.first) for one in own)
        assert share.share == pytest.approx(points / len(own))
        assert share.low <= share.share <= share.high
    agreement = measure_agreement(
        {name: [one for one in ratings if one.rater == name] for name in ("anna", "ben")}, samples=50
    )
    assert agreement.fleiss is not None
    assert found.fleiss is not None
    assert found.fleiss["value"] == agreement.fleiss.value
    assert found.agreements[0]["same"]["count"] == 12


def test_systems_that_did_not_meet_yet_are_no_fault(arena: Make) -> None:
    store = arena(systems="abcd", prompts=2)
    prefer(store, "anna", "a", most=1)
    found = take_survey(store, samples=20)
    assert found.votes == 1
    assert len(found.shares) == 1


def test_an_export_is_read_as_ratings(arena: Make, tmp_path: Path) -> None:
    store = arena(systems="abc", prompts=5)
    prefer(store, "anna", "a", tie_every=3)
    prefer(store, "ben", "c")
    target = tmp_path / "out/ratings.jsonl"
    export_votes(store.votes(), target)
    export_votes(store.votes(), target)  # an export of ours may be replaced
    assert [(one.first, one.second, one.label, one.prompt, one.rater) for one in read_ratings(target)] == [
        (one.first, one.second, one.label, one.prompt, one.rater) for one in map(rating, store.votes())
    ]
    assert {name: len(given) for name, given in read_raters([(None, str(target))]).items()} == {"anna": 15, "ben": 15}
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert {record["vote"]: record["label"] for record in records} == {"A": 1, "B": 2, "both bad": 3, "tie": 3}
    assert all((record["first"] < record["second"]) == (record["order"] == 1) for record in records)
    tokens = [*store.raters.values(), store.organiser]
    assert not any(token in target.read_text() for token in tokens)


@pytest.mark.parametrize("content", ["notes\n", '{"first": "a", "second": "b", "label": 1}\n', "[1]\n"])
def test_what_is_no_export_is_not_replaced(arena: Make, tmp_path: Path, content: str) -> None:
    target = tmp_path / "ratings.jsonl"
    target.write_text(content)
    with pytest.raises(OutputExists, match="no votes of fourbit arena"):
        export_votes(arena().votes(), target)
    assert target.read_text() == content
