"""What the organiser sees: how far it is, how far raters agree, who wins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from fourbit.errors import InputError
from fourbit.evaluate.agreement import Agreement, measure_agreement
from fourbit.evaluate.arena.ballots import CHOICES, Progress, Vote
from fourbit.evaluate.arena.store import Store
from fourbit.evaluate.arena.votes import rating
from fourbit.evaluate.bootstrap import bootstrap_interval
from fourbit.evaluate.likelihood import bradley_terry

__all__ = ["RaterSurvey", "Share", "Survey", "take_survey"]

SAMPLES = 500
"""Resamples of the prompts, few enough for a page that is looked at while votes come in."""


@dataclass(frozen=True)
class RaterSurvey:
    """One rater.

    Attributes:
        choices: how often each was chosen.
        median_seconds: of a vote; None without votes.
        last_at: when the rater voted last, in seconds since 1970.
    """

    rater: str
    done: int
    left: int
    choices: dict[str, int]
    median_seconds: float | None
    last_at: float | None


@dataclass(frozen=True)
class Share:
    """Two systems: votes for the first, ties, votes for the second, and the share of points of the first.

    Attributes:
        both_bad: how many of the ties.
        low, high: the interval of the share over prompts.
    """

    first: str
    second: str
    wins: int
    ties: int
    both_bad: int
    losses: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Survey:
    """Everything.

    Attributes:
        votes: how many stand.
        pairs, covered, shared: how many pairs there are, how many have a vote, and how many have two or more.
        shown_first: the share of points that went to the answer shown first.
        ranking: the standings of a Bradley-Terry model, the best first; empty where nothing can be ranked.
        fleiss: with value, low, high, count; None where nothing can be said.
        agreements: of each two raters: first, second, same, cohen.
        notes: what a reader should know, a sentence each.
    """

    systems: tuple[str, ...]
    live: bool
    votes: int
    pairs: int
    covered: int
    shared: int
    shown_first: float | None
    raters: tuple[RaterSurvey, ...]
    shares: tuple[Share, ...]
    ranking: tuple[dict[str, Any], ...]
    fleiss: dict[str, Any] | None
    agreements: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]


def take_survey(store: Store, *, raters_per_pair: int | None = None, samples: int = SAMPLES) -> Survey:
    """Count everything.

    Args:
        raters_per_pair: see `Store.next`.
        samples: of the bootstrap over prompts.
    """
    votes = store.votes()
    by_pair = Counter((vote.prompt, *sorted(vote.systems)) for vote in votes)
    ranking, notes = _ranked(votes, samples)
    agreement, more = _agreed(votes, samples)
    return Survey(
        systems=store.systems,
        live=store.live,
        votes=len(votes),
        pairs=sum(store.pairs_by_systems().values()),
        covered=len(by_pair),
        shared=sum(count > 1 for count in by_pair.values()),
        shown_first=float(np.mean([_points(vote) for vote in votes])) if votes else None,
        raters=tuple(
            _of_rater(
                rater,
                [vote for vote in votes if vote.rater == rater],
                store.progress(rater, raters_per_pair=raters_per_pair),
            )
            for rater in store.raters
        ),
        shares=tuple(_shares(votes, samples)),
        ranking=ranking,
        fleiss=None if agreement is None or agreement.fleiss is None else asdict(agreement.fleiss),
        agreements=()
        if agreement is None
        else tuple(
            {key: value for key, value in asdict(pair).items() if key in ("first", "second", "same", "cohen")}
            for pair in agreement.pairs
        ),
        notes=(*notes, *more),
    )


def _points(vote: Vote) -> float:
    """Of the answer shown first."""
    return {"A": 1.0, "B": 0.0}.get(vote.choice, 0.5)


def _of_rater(rater: str, votes: Sequence[Vote], progress: Progress) -> RaterSurvey:
    counts = Counter(vote.choice for vote in votes)
    return RaterSurvey(
        rater,
        progress.done,
        progress.left,
        {choice: counts[choice] for choice in CHOICES},
        median(vote.seconds for vote in votes) if votes else None,
        votes[-1].voted_at if votes else None,
    )


def _shares(votes: Sequence[Vote], samples: int) -> list[Share]:
    by_systems: dict[tuple[str, str], list[Vote]] = {}
    for vote in votes:
        one, other = sorted(vote.systems)
        by_systems.setdefault((one, other), []).append(vote)
    found = []
    for (one, other), own in sorted(by_systems.items()):
        points = [_points(vote) if vote.systems[0] == one else 1 - _points(vote) for vote in own]
        prompts: dict[str | int, int] = {}
        columns = np.zeros((len({vote.prompt for vote in own}), 2))
        for vote, gained in zip(own, points, strict=True):
            columns[prompts.setdefault(vote.prompt, len(prompts))] += gained, 1
        low, high = bootstrap_interval(lambda sums: sums[:, 0] / sums[:, 1], columns, samples=samples)
        counts = Counter(points)
        bad = sum(vote.choice == "both bad" for vote in own)
        share = float(np.mean(points))
        found.append(Share(one, other, counts[1.0], counts[0.5], bad, counts[0.0], share, low, high))
    return found


def _ranked(votes: Sequence[Vote], samples: int) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    if not votes:
        return (), ()
    try:
        ranking = bradley_terry([rating(vote) for vote in votes], samples=samples)
    except InputError as error:  # systems that never met yet
        return (), (str(error),)
    return tuple(asdict(row) for row in ranking), ranking.notes


def _agreed(votes: Sequence[Vote], samples: int) -> tuple[Agreement | None, tuple[str, ...]]:
    by_rater: dict[str, list[Any]] = {}
    for vote in votes:
        by_rater.setdefault(vote.rater, []).append(rating(vote))
    if len(by_rater) < 2:
        return None, ()
    try:
        found = measure_agreement(by_rater, samples=samples)
    except InputError as error:  # scipy is not there
        return None, (str(error),)
    return found, ()
