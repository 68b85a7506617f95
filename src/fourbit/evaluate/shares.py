"""Scores as a share of a reference system's: the measure of the paper's table on the Vicuna prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError
from fourbit.evaluate.bootstrap import bootstrap_interval
from fourbit.evaluate.ratings import DROPPED, Rating

__all__ = ["Share", "measure_shares"]


@dataclass(frozen=True)
class Share:
    """The scores of a model, in percent of the reference's in the same judgements.

    Attributes:
        reference_first, model_first: by whose answer was shown first; None where that order was not judged.
        mean: over all judgements of both orders.
        low, high: the bootstrap interval of the mean, over prompts.
        judgements: with scores.
    """

    model: str
    reference_first: float | None
    model_first: float | None
    mean: float
    low: float
    high: float
    judgements: int


def measure_shares(ratings: Iterable[Rating], reference: str, *, samples: int = 2000, seed: int = 0) -> list[Share]:
    """Sum up the scores of each model and of the reference, over the judgements of the two, and divide.

    Args:
        ratings: with scores; those of other pairs, and those that could not be parsed, are left out.
        reference: the system that counts as 100.
        samples, seed: of the bootstrap.

    Returns:
        The best first.

    Raises:
        InputError: no rating has scores, or none is against the reference.
    """
    given = list(ratings)
    if not any(rating.scores is not None for rating in given):
        raise InputError("No rating has scores: a share needs two scores per rating, not who won.")
    kept: dict[str, list[Rating]] = {}
    for rating in given:
        if rating.scores is not None and rating.label != DROPPED and reference in (rating.first, rating.second):
            model = rating.second if rating.first == reference else rating.first
            kept.setdefault(model, []).append(rating)
    if not kept:
        known = sorted({name for rating in given for name in (rating.first, rating.second)})
        raise InputError(f"No score is against {reference!r}; the systems are {', '.join(known)}.")
    shares = [_share(model, reference, ratings, samples, seed) for model, ratings in kept.items()]
    return sorted(shares, key=lambda share: -share.mean)


def _share(model: str, reference: str, ratings: list[Rating], samples: int, seed: int) -> Share:
    prompts: dict[str, int] = {}
    sums: dict[int, list[float]] = {}
    orders = np.zeros((2, 2))
    for number, rating in enumerate(ratings):
        assert rating.scores is not None
        swapped = rating.first != reference
        theirs, own = rating.scores[::-1] if swapped else rating.scores
        orders[int(swapped)] += (own, theirs)
        prompt = prompts.setdefault(rating.prompt or f"rating {number}", len(prompts))
        row = sums.setdefault(prompt, [0.0, 0.0])
        row[0] += own
        row[1] += theirs
    if orders[:, 1].sum() == 0:
        raise InputError(f"{reference!r} has only scores of 0 beside {model!r}; there is nothing to be a share of.")

    def ratio(columns: NDArray[np.float64]) -> NDArray[np.float64]:
        return 100 * columns[:, 0] / np.maximum(columns[:, 1], 1e-300)

    low, high = bootstrap_interval(ratio, np.array(list(sums.values())), samples=samples, seed=seed)
    by_order = [100 * float(own / theirs) if theirs else None for own, theirs in orders]
    mean = float(100 * orders[:, 0].sum() / orders[:, 1].sum())
    return Share(model, by_order[0], by_order[1], mean, low, high, len(ratings))
