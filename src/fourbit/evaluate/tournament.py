"""Elo as chess players know it, made independent of the order of the matches by playing them in many random orders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError
from fourbit.evaluate.matches import Given, Matches, collect
from fourbit.evaluate.ranking import Noise, Ranking, check_samples, rank, resamples

__all__ = ["elo"]

Numbers = NDArray[np.float64]
Progress = Callable[[int, int], None]

CALL_UPDATES = 20_000_000
"""Matches that one call of the kernel plays, of which a core does some 10^8 a second: progress shows often enough."""

RESAMPLED_UPDATES = 100_000_000
FEWEST_ORDERS, MOST_ORDERS = 8, 64
"""What the bootstrap may cost, and the orders of each resample that follow. The noise of few orders is taken out."""


def elo(
    matches: Given,
    *,
    orderings: int = 10_000,
    k: float = 32.0,
    seed: int = 0,
    start: float = 1000.0,
    matches_per_order: int | None = None,
    samples: int = 1000,
    progress: Progress | None = None,
) -> Ranking:
    """Rank models by tournament Elo: the mean over random orders of the matches.

    Everyone starts with `start`; a match between a and b, of which a gets s points (1, 1/2 for a tie, or 0), does
    r_a += k (s - e), r_b -= k (s - e) with e = 1 / (1 + 10^((r_b - r_a) / 400)). Both presentation orders of a pair
    are matches of their own.

    Args:
        matches: see `fourbit.evaluate.matches.Given`.
        orderings: random orders.
        k: the most points that a match can move.
        seed: of all that is drawn.
        start: the rating of who has not played; the mean of all ratings stays there.
        matches_per_order: play so many, drawn anew for each order, in place of all.
        samples: resamples of the prompts for the intervals.
        progress: called with the matches played so far and their whole number.

    Raises:
        InputError: what cannot be ranked; see `collect`.

    Source: QLoRA, arXiv:2305.14314, section 5.2.
    """
    tournament = collect(matches)
    _check(tournament, orderings, k, start, matches_per_order)
    check_samples(samples)
    length = min(matches_per_order or len(tournament), len(tournament))
    orders = int(np.clip(RESAMPLED_UPDATES // (samples * length), FEWEST_ORDERS, MOST_ORDERS))
    counted = _Counter(progress, orderings * length + samples * orders * length)
    point = _mean_of_orders(tournament, orderings, length, k, start, seed, counted)
    resampled, covariance = _resampled(tournament, samples, orders, matches_per_order, k, start, seed, counted)
    noise = Noise(covariance, 1 / orders, 1 / orderings + 1 / (samples * orders))
    notes = []
    if matches_per_order is not None and matches_per_order > len(tournament):
        notes.append(
            f"There are {len(tournament):,} matches, fewer than the {matches_per_order:,} asked for: all are used."
        )
    return rank(tournament, point, resampled, method="elo", noise=noise, notes=notes)


class _Counter:
    """Progress over several loops."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _check(matches: Matches, orderings: int, k: float, start: float, matches_per_order: int | None) -> None:
    from fourbit.kernels.ops.elo import MOST_PLAYERS

    if len(matches.models) > MOST_PLAYERS:
        raise InputError(f"There are {len(matches.models):,} models; a tournament has at most {MOST_PLAYERS:,}.")
    if orderings < 1:
        raise InputError(f"The number of orderings is {orderings}; it must be 1 at least.")
    if not 0 < k < float("inf") or not abs(start) < float("inf"):
        raise InputError(f"K is {k:g} and the start {start:g}; K must be above 0, and both finite.")
    if matches_per_order is not None and matches_per_order < 1:
        raise InputError(f"The matches per order are {matches_per_order}; it must be 1 at least.")


def _packed(matches: Matches) -> NDArray[np.int64]:
    """[M] as the kernel takes them."""
    result: NDArray[np.int64] = matches.first | matches.second << 15 | (2 * matches.points).astype(np.int64) << 30
    return result


def _mean_of_orders(
    matches: Matches, orderings: int, length: int, k: float, start: float, seed: int, counted: _Counter
) -> Numbers:
    import torch

    from fourbit.kernels import ops

    players = len(matches.models)
    packed, ends = torch.from_numpy(_packed(matches)), torch.tensor([len(matches)])
    chunk = max(16, CALL_UPDATES // max(length, players))
    total = np.zeros(players)
    for first in range(0, orderings, chunk):
        count = min(chunk, orderings - first)
        ratings = ops.elo(
            packed, ends, players=players, orders=count, first_order=first, length=length, seed=seed, k=k, start=start
        )
        total += ratings[0].sum(dim=0).numpy()
        counted.add(count * length)
    return total / orderings


def _resampled(
    matches: Matches,
    samples: int,
    orders: int,
    matches_per_order: int | None,
    k: float,
    start: float,
    seed: int,
    counted: _Counter,
) -> tuple[Numbers, Numbers]:
    """[B, P] the mean ratings of each resample, and [P, P] the covariance of ratings after one order."""
    import torch

    from fourbit.kernels import ops

    players, packed = len(matches.models), _packed(matches)
    drawn = resamples(matches.prompt_count, samples, seed=seed)
    means, noise = np.empty((samples, players)), np.zeros((players, players))
    length = min(matches_per_order or len(matches), len(matches))
    chunk = int(np.clip(CALL_UPDATES // (orders * max(length, players)), 1, samples))
    for first in range(0, samples, chunk):
        tournaments = [packed.repeat(times[matches.prompts]) for times in drawn[first : first + chunk]]
        ratings = ops.elo(
            torch.from_numpy(np.concatenate(tournaments)),
            torch.tensor([len(tournament) for tournament in tournaments]).cumsum(0),
            players=players,
            orders=orders,
            length=matches_per_order or max(len(tournament) for tournament in tournaments),
            seed=seed + 1 + first,  # other orders than those of the ratings themselves
            k=k,
            start=start,
        ).numpy()
        means[first : first + chunk] = ratings.mean(axis=1)
        around = (ratings - ratings.mean(axis=1, keepdims=True)).reshape(-1, players)
        noise += around.T @ around
        counted.add(len(tournaments) * orders * length)
    return means, noise / (samples * (orders - 1))
