"""A ranking with what is sure about it: intervals, and the pairs that cannot be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError
from fourbit.evaluate.matches import Matches

__all__ = ["LEVEL", "Noise", "Pair", "Ranking", "Standing", "check_samples", "rank", "resamples"]

LEVEL = 0.95
"""The share of resampled values that an interval holds."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Standing:
    """One model's place.

    Attributes:
        elo: the rating, in Elo points: 400 are odds of ten to one.
        low, high: the bootstrap interval over prompts.
        matches: that the model played.
        untold: the models that it cannot be told apart from: the interval of the difference holds 0.
    """

    model: str
    elo: float
    low: float
    high: float
    matches: int
    untold: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two models, the higher rated one first.

    Attributes:
        wins, losses, ties: of the first model against the second; 0 where they never met.
        first_shown, first_shown_points: how many of these matches showed the first model's answer first, and its points
            in them.
        difference: of the ratings, with its interval.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    first_shown: int
    first_shown_points: float
    difference: float
    low: float
    high: float

    @property
    def matches(self) -> int:
        """How often they met."""
        return self.wins + self.losses + self.ties

    @property
    def points(self) -> float:
        """Of the first model: a win is one, a tie a half."""
        return self.wins + self.ties / 2

    @property
    def told_apart(self) -> bool:
        """Whether the interval of the difference leaves 0 out."""
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Ranking:
    """Models, the best first; iterating gives the standings.

    Attributes:
        method: "elo" or "bradley-terry".
        standings: see `Standing`.
        pairs: see `Pair`, in the order of the standings.
        matches, prompts, dropped: how many there were, on how many prompts, and how many could not be parsed.
        shown_first_share: the points of the answer shown first, as a share of all: 1/2 without order bias.
        notes: what a reader should know, a sentence each.
    """

    method: str
    standings: tuple[Standing, ...]
    pairs: tuple[Pair, ...]
    matches: int
    prompts: int
    dropped: int
    shown_first_share: float
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {
            "method": self.method,
            "ratings": [
                {
                    "model": row.model,
                    "elo": row.elo,
                    "low": row.low,
                    "high": row.high,
                    "matches": row.matches,
                    "cannot_be_told_apart_from": list(row.untold),
                }
                for row in self
            ],
            "pairs": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    "wins": pair.wins,
                    "losses": pair.losses,
                    "ties": pair.ties,
                    "points": pair.points / pair.matches if pair.matches else None,
                    "difference": pair.difference,
                    "low": pair.low,
                    "high": pair.high,
                    "told_apart": pair.told_apart,
                }
                for pair in self.pairs
            ],
            "matches": self.matches,
            "prompts": self.prompts,
            "dropped": self.dropped,
            "shown_first_share": self.shown_first_share,
            "notes": list(self.notes),
        }

    def __iter__(self) -> Iterator[Standing]:
        return iter(self.standings)

    def __len__(self) -> int:
        return len(self.standings)


@dataclass(frozen=True, eq=False)
class Noise:
    """What random orders do to ratings, beside the draw of the prompts.

    Attributes:
        covariance: [P, P] of the ratings after one order.
        resampled: the share of it that a resampled rating has: 1 over the orders of each resample.
        point: the share that the ratings themselves have, and the centre of the resampled ones.
    """

    covariance: Numbers
    resampled: float
    point: float


def check_samples(samples: int) -> None:
    """Refuse a number of resamples that gives no interval."""
    if samples < 20:
        raise InputError(f"{samples} resamples give no interval of {LEVEL:.0%}; take 20 at least, and better 1000.")


def resamples(count: int, samples: int, *, seed: int) -> NDArray[np.int64]:
    """[samples, count]: how often each resample of `count` prompts, drawn with replacement, holds each prompt."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)


def rank(
    matches: Matches,
    point: Numbers,
    resampled: Numbers,
    *,
    method: str,
    noise: Noise | None = None,
    notes: Sequence[str] = (),
) -> Ranking:
    """Put a ranking together.

    Args:
        matches: of P models.
        point: [P] ratings.
        resampled: [B, P] ratings of the bootstrap's resamples.
        method: its name.
        noise: what chance beside the draw of prompts did to the ratings; none by default.
        notes: for the reader.
    """
    models, count = matches.models, len(point)
    noise = noise or Noise(np.zeros((count, count)), 0, 0)
    ends = _interval(resampled, np.diagonal(noise.covariance), noise)
    order = sorted(range(count), key=lambda model: -point[model])
    met = _meetings(matches)
    pairs = []
    untold: dict[int, list[int]] = {model: [] for model in range(count)}
    for place, one in enumerate(order):
        others = order[place + 1 :]
        if not others:
            break
        shared = noise.covariance
        variance = shared[one, one] + np.diagonal(shared)[others] - 2 * shared[one, others]
        low, high = _interval(resampled[:, [one]] - resampled[:, others], variance, noise)
        for index, other in enumerate(others):
            pair = _pair(
                models, one, other, met, float(point[one] - point[other]), float(low[index]), float(high[index])
            )
            pairs.append(pair)
            if not pair.told_apart:
                untold[one].append(other)
                untold[other].append(one)
    return Ranking(
        method=method,
        standings=_standings(matches, point, ends, order, untold),
        pairs=tuple(pairs),
        matches=len(matches),
        prompts=matches.prompt_count,
        dropped=matches.dropped,
        shown_first_share=float(matches.points.mean()),
        notes=(*notes, *_remarks(matches)),
    )


def _standings(
    matches: Matches,
    point: Numbers,
    ends: tuple[Numbers, Numbers],
    order: Sequence[int],
    untold: Mapping[int, Sequence[int]],
) -> tuple[Standing, ...]:
    models, places = matches.models, {model: place for place, model in enumerate(order)}
    played = np.bincount(matches.first, minlength=len(models)) + np.bincount(matches.second, minlength=len(models))
    return tuple(
        Standing(
            models[model],
            float(point[model]),
            float(ends[0][model]),
            float(ends[1][model]),
            int(played[model]),
            tuple(models[other] for other in sorted(untold[model], key=places.__getitem__)),
        )
        for model in order
    )


def _interval(resampled: Numbers, order_variance: Numbers, noise: Noise) -> tuple[Numbers, Numbers]:
    """Percentiles of the columns of [B, N], each drawn in until its variance is that of the prompts and of the rating.

    Args:
        order_variance: [N] of a column after one order.
    """
    variance, order_variance = resampled.var(axis=0), np.clip(order_variance, 0, None)
    wanted = np.clip(variance - noise.resampled * order_variance, 0, None) + noise.point * order_variance
    share = np.sqrt(wanted / np.where(variance > 0, variance, 1))
    centre = resampled.mean(axis=0)
    low, high = np.quantile(centre + (resampled - centre) * share, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _meetings(matches: Matches) -> dict[str, NDArray[np.int64]]:
    """[P, P] counts by the model shown first and the one shown second: wins of the first, losses and ties."""
    count = len(matches.models)
    cell = matches.first * count + matches.second
    return {
        name: np.bincount(cell[matches.points == points], minlength=count * count).reshape(count, count)
        for name, points in (("wins", 1.0), ("losses", 0.0), ("ties", 0.5))
    }


def _pair(
    models: Sequence[str],
    one: int,
    other: int,
    met: dict[str, NDArray[np.int64]],
    difference: float,
    low: float,
    high: float,
) -> Pair:
    wins, losses, ties = met["wins"], met["losses"], met["ties"]
    return Pair(
        first=models[one],
        second=models[other],
        wins=int(wins[one, other] + losses[other, one]),
        losses=int(losses[one, other] + wins[other, one]),
        ties=int(ties[one, other] + ties[other, one]),
        first_shown=int(wins[one, other] + losses[one, other] + ties[one, other]),
        first_shown_points=float(wins[one, other] + ties[one, other] / 2),
        difference=difference,
        low=low,
        high=high,
    )


def _remarks(matches: Matches) -> list[str]:
    notes = []
    if not matches.with_prompts:
        notes.append(
            "The ratings name no prompts: the intervals take each match for an independent one, and are too narrow if"
            " prompts repeat."
        )
    elif matches.prompt_count < 20:
        notes.append(f"There are {matches.prompt_count} prompts only: the intervals are rough.")
    pairs = {*zip(matches.first.tolist(), matches.second.tolist(), strict=True)}
    one_way = sum((other, one) not in pairs for one, other in pairs)
    if one_way:
        notes.append(
            f"{one_way} of {len({frozenset(pair) for pair in pairs})} pairs were shown in one order only: an order bias"
            " of the rater would not cancel."
        )
    return notes
