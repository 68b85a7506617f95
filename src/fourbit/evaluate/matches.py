"""A tournament: ratings as columns of numbers, checked to be one that can be ranked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError
from fourbit.evaluate.ratings import DROPPED, FIRST, SECOND, TIE, Rating

__all__ = ["Given", "Matches", "collect"]

_POINTS = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}


@dataclass(frozen=True, eq=False)
class Matches:
    """M matches between P models.

    Attributes:
        models: the names, in the order of their first match.
        first, second: [M] int64, the models of a match in the order of the presentation.
        points: [M] fp64 of the first: 1, 1/2 for a tie, or 0.
        prompts: [M] int64, which of Q prompts a match is about; what is resampled for intervals.
        prompt_count: Q.
        dropped: ratings that could not be parsed.
        with_prompts: whether the ratings say their prompts; else each match counts as one of its own.
    """

    models: tuple[str, ...]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    points: NDArray[np.float64]
    prompts: NDArray[np.int64]
    prompt_count: int
    dropped: int = 0
    with_prompts: bool = True

    def __len__(self) -> int:
        return len(self.points)


Given = Matches | Iterable["Rating | tuple[str, str, int] | tuple[str, str, int, str]"]
"""Matches, or ratings as `read_ratings` gives them, or (first, second, label) with or without a prompt."""


def collect(given: Given, *, models: Sequence[str] = ()) -> Matches:
    """Gather ratings into a tournament.

    Args:
        given: see `Given`; labels are 1, 2, 3 (a tie) or -1 (dropped and counted).
        models: keep the matches between these only; all by default.

    Raises:
        InputError: a label outside these, a model that never plays, nothing to rank, or groups of models that never met
            each other.
    """
    if isinstance(given, Matches):
        return given
    ratings = [_rating(one) for one in given]
    if models:
        ratings = _chosen(ratings, models)
    kept = [rating for rating in ratings if rating.label != DROPPED]
    dropped = len(ratings) - len(kept)
    if not kept:
        what = f"none of the {dropped:,} ratings could be parsed" if dropped else "there is no rating"
        raise InputError(f"There is nothing to rank: {what}.")
    names: dict[str, int] = {}
    prompts: dict[str, int] = {}
    for rating in kept:
        names.setdefault(rating.first, len(names))
        names.setdefault(rating.second, len(names))
        prompts.setdefault(rating.prompt, len(prompts))
    _check_all_play(ratings, names)
    with_prompts = "" not in prompts
    matches = Matches(
        models=tuple(names),
        first=np.array([names[rating.first] for rating in kept]),
        second=np.array([names[rating.second] for rating in kept]),
        points=np.array([_POINTS[rating.label] for rating in kept]),
        prompts=np.array([prompts[rating.prompt] for rating in kept]) if with_prompts else np.arange(len(kept)),
        prompt_count=len(prompts) if with_prompts else len(kept),
        dropped=dropped,
        with_prompts=with_prompts,
    )
    _check_connected(matches)
    return matches


def _rating(given: Rating | tuple[str, str, int] | tuple[str, str, int, str]) -> Rating:
    rating = given if isinstance(given, Rating) else Rating(*given)
    if rating.label not in (*_POINTS, DROPPED):
        raise InputError(f"The label of a match is {rating.label!r}; it must be 1, 2, 3 (a tie) or -1 (not parsed).")
    if rating.first == rating.second:
        raise InputError(f"{rating.first!r} cannot play against itself.")
    return rating


def _chosen(ratings: list[Rating], models: Sequence[str]) -> list[Rating]:
    known = {name for rating in ratings for name in (rating.first, rating.second)}
    if unknown := [name for name in models if name not in known]:
        raise InputError(f"No rating speaks of {unknown[0]!r}; the models are {', '.join(sorted(known))}.")
    if len(set(models)) < 2:
        raise InputError(f"Only {models[0]!r} is asked for; a ranking needs two models.")
    kept = [rating for rating in ratings if rating.first in models and rating.second in models]
    playing = {name for rating in kept for name in (rating.first, rating.second)}
    if idle := [name for name in models if name not in playing]:
        raise InputError(f"{idle[0]!r} never plays against any of the other models asked for.")
    return kept


def _check_all_play(ratings: Iterable[Rating], names: dict[str, int]) -> None:
    for rating in ratings:
        for name in (rating.first, rating.second):
            if name not in names:
                raise InputError(f"No rating of {name!r} could be parsed, so that it never plays; leave it out.")


def _check_connected(matches: Matches) -> None:
    groups = _groups(matches)
    if len(groups) > 1:
        shown = "; ".join(", ".join(sorted(group)[:3]) + (", ..." if len(group) > 3 else "") for group in groups[:3])
        raise InputError(
            f"The models fall into {len(groups)} groups that never met ({shown}), whose ratings cannot be compared; add"
            " matches between them, or rank each group alone."
        )


def _groups(matches: Matches) -> list[list[str]]:
    leader = list(range(len(matches.models)))

    def find(model: int) -> int:
        while leader[model] != model:
            leader[model] = leader[leader[model]]
            model = leader[model]
        return model

    for one, other in {*zip(matches.first.tolist(), matches.second.tolist(), strict=True)}:
        leader[find(one)] = find(other)
    groups: dict[int, list[str]] = {}
    for model, name in enumerate(matches.models):
        groups.setdefault(find(model), []).append(name)
    return list(groups.values())
