"""Strengths by maximum likelihood: the ratings that make the results most likely, whatever their order.

    P(a beats b) = 1 / (1 + exp(s_b - s_a)),   a tie is half a win and half a loss

The likelihood has a maximum only where every model won a point, along a chain of others, from every other. Where one
won or lost everything its strength would be infinite; a weak normal prior then holds the strengths back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fourbit.evaluate.matches import Given, Matches, collect
from fourbit.evaluate.ranking import Ranking, check_samples, rank, resamples

__all__ = ["bradley_terry", "strengths"]

Numbers = NDArray[np.float64]

POINTS_PER_UNIT = 400 / math.log(10)
"""Elo points of one unit of strength."""

PRIOR_DEVIATION = 10.0
"""Of the prior, in units of strength: 1737 Elo points, so that it decides only what the matches leave open."""

_STEPS, _LARGEST_STEP = 200, 2.0
_BATCH_CELLS = 4_000_000


def bradley_terry(
    matches: Given,
    *,
    seed: int = 0,
    start: float = 1000.0,
    samples: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """Rank models by their Bradley-Terry strengths, in Elo points.

    Args:
        matches: see `fourbit.evaluate.matches.Given`.
        seed: of the bootstrap.
        start: the mean of the ratings.
        samples: resamples of the prompts for the intervals.
        progress: called with the resamples done and their number.

    Raises:
        InputError: what cannot be ranked; see `collect`.

    Source: Bradley and Terry, Biometrika 39 (1952); ties as in Chatbot Arena, arXiv:2403.04132.
    """
    tournament = collect(matches)
    check_samples(samples)
    count = len(tournament.models)
    whole = _won(tournament, np.ones((1, tournament.prompt_count)))
    notes = []
    if not _is_bounded(whole)[0]:
        notes.append(
            "Some models won, or lost, every match against the others: their strength has no bound, and is held back by"
            f" a weak prior (standard deviation {PRIOR_DEVIATION * POINTS_PER_UNIT:,.0f} points)."
        )
    point = strengths(whole)[0]
    resampled = np.empty((samples, count))
    drawn = resamples(tournament.prompt_count, samples, seed=seed)
    batch = max(1, _BATCH_CELLS // (count * count))
    for first in range(0, samples, batch):
        resampled[first : first + batch] = strengths(_won(tournament, drawn[first : first + batch]))
        if progress is not None:
            progress(min(first + batch, samples), samples)
    scaled = [start + POINTS_PER_UNIT * values for values in (point, resampled)]
    return rank(tournament, scaled[0], scaled[1], method="bradley-terry", notes=notes)


def _won(matches: Matches, times: NDArray[np.int64] | Numbers) -> Numbers:
    """[B, P, P] points of the row's model against the column's, with the matches of a prompt counted `times` [B, Q]."""
    count = len(matches.models)
    wins = matches.first * count + matches.second
    losses = matches.second * count + matches.first
    won = np.empty((len(times), count * count))
    for row, weight in zip(won, times, strict=True):
        own = weight[matches.prompts]
        row[:] = np.bincount(wins, weights=own * matches.points, minlength=count * count)
        row += np.bincount(losses, weights=own * (1 - matches.points), minlength=count * count)
    return won.reshape(len(times), count, count)


def strengths(won: Numbers) -> Numbers:
    """Maximise the likelihood of several tournaments at once, by Newton's method.

    Args:
        won: [B, P, P] points of the row's model against the column's; the diagonal is 0.

    Returns:
        [B, P] natural-logarithmic strengths of mean 0. Where a tournament leaves a strength unbounded, or a model out,
        the maximum is that with the prior (`PRIOR_DEVIATION`).
    """
    count = won.shape[1]
    prior = np.where(_is_bounded(won), 0.0, PRIOR_DEVIATION**-2)
    games = won + won.transpose(0, 2, 1)
    diagonal = np.arange(count)
    found = np.zeros(won.shape[:2])
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(found[:, None, :] - found[:, :, None]))
        slope = (won - games * chance).sum(axis=2) - prior[:, None] * found
        bend = games * chance * (1 - chance)
        curvature = 1 / count - bend  # the constant fixes the mean, which the matches leave open
        curvature[:, diagonal, diagonal] += bend.sum(axis=2) + prior[:, None]
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        largest = np.abs(step).max(axis=1, keepdims=True)
        found += step * np.minimum(1, _LARGEST_STEP / np.maximum(largest, 1e-300))
        if largest.max() < 1e-10:
            break
    result: Numbers = found - found.mean(axis=1, keepdims=True)
    return result


def _is_bounded(won: Numbers) -> NDArray[np.bool_]:
    """[B] whether from every model a chain of points won leads to every other."""
    count = won.shape[1]
    reaches: Numbers = ((won > 0) | np.eye(count, dtype=bool)).astype(np.float64)
    for _ in range(max(1, math.ceil(math.log2(count)))):
        reaches = (reaches @ reaches > 0).astype(np.float64)
    return np.asarray((reaches > 0).all(axis=(1, 2)), dtype=np.bool_)
