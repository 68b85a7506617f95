"""What raters said of the same answers, side by side: a table of verdicts by item and rater."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError
from fourbit.evaluate.ratings import DROPPED, SECOND, TIE, Rating

__all__ = ["BEST", "EVEN", "MISSING", "WORST", "Verdicts", "tabulate"]

MISSING, BEST, WORST, EVEN = -1, 0, 1, 2
"""Of an item's two models in the order of the alphabet: the first is the better one, the worse one, or neither is."""

Item = tuple[str, str, str, str]
"""Prompt, turn, and the two models."""


@dataclass(frozen=True, eq=False)
class Verdicts:
    """R raters on I items; an item is a prompt with the answers of two models.

    Attributes:
        raters, models: the names.
        table: [R, I] int64: `BEST`, `WORST`, `EVEN` or `MISSING`. Both presentation orders of an item are one verdict:
            the sum of their points, so that two that contradict each other are a tie.
        prompts: [I] int64, which of Q prompts an item is about.
        prompt_count: Q.
        pairs: [I, 2] int64, the models of an item in the order of the alphabet.
        orders: by rater, [N, 3]: the prompt of an item that was rated in both orders, its verdict where the answer of
            the first model was shown first, and where it was shown second.
        shown: by rater, [M, 2]: the prompt of a rating, and the points of the answer shown first.
    """

    raters: tuple[str, ...]
    models: tuple[str, ...]
    table: NDArray[np.int64]
    prompts: NDArray[np.int64]
    prompt_count: int
    pairs: NDArray[np.int64]
    orders: Mapping[str, NDArray[np.int64]]
    shown: Mapping[str, NDArray[np.float64]]

    def points(self, rater: int) -> NDArray[np.float64]:
        """[I] of the first model of each item: 1, 1/2, 0, or NaN where the rater said nothing."""
        points: NDArray[np.float64] = np.array([1.0, 0.0, 0.5, np.nan])[self.table[rater]]
        return points


def tabulate(ratings: Mapping[str, Sequence[Rating]], majorities: Mapping[str, Sequence[str]]) -> Verdicts:
    """Lay the verdicts of raters side by side.

    Args:
        ratings: by rater.
        majorities: further raters, each the majority of others: what most of them say of an item; a tie where as many
            say something else.

    Raises:
        InputError: a rater without ratings, a majority of unknown raters, ratings without prompts.
    """
    points: dict[str, dict[Item, dict[bool, list[float]]]] = {}
    shown: dict[str, list[tuple[str, float]]] = {}
    for rater, given in ratings.items():
        points[rater], shown[rater] = _points(rater, given)
    spoken = {
        rater: {
            item: _category(sum(map(sum, by_order.values())), sum(map(len, by_order.values())))
            for item, by_order in own.items()
        }
        for rater, own in points.items()
    }
    for name, members in majorities.items():
        spoken[name] = _majority(name, members, spoken)
    items = sorted({item for own in spoken.values() for item in own})
    models = sorted({model for item in items for model in item[2:]})
    prompts = {prompt: number for number, prompt in enumerate(sorted({item[0] for item in items}))}
    numbers = {model: number for number, model in enumerate(models)}
    return Verdicts(
        raters=tuple(spoken),
        models=tuple(models),
        table=np.array([[own.get(item, MISSING) for item in items] for own in spoken.values()]),
        prompts=np.array([prompts[item[0]] for item in items]),
        prompt_count=len(prompts),
        pairs=np.array([[numbers[item[2]], numbers[item[3]]] for item in items]),
        orders={rater: _orders(own, prompts) for rater, own in points.items()},
        shown={
            rater: np.array([[prompts[prompt], gained] for prompt, gained in rows]) for rater, rows in shown.items()
        },
    )


def _points(
    rater: str, ratings: Sequence[Rating]
) -> tuple[dict[Item, dict[bool, list[float]]], list[tuple[str, float]]]:
    """Points of the first model of each item, by whether its answer was shown first; and of the answer shown first."""
    found: dict[Item, dict[bool, list[float]]] = defaultdict(lambda: defaultdict(list))
    shown = []
    for rating in ratings:
        if rating.label == DROPPED:
            continue
        if not rating.prompt:
            raise InputError(f"{rating.place or rater}: the rating names no prompt, so that nothing can be compared.")
        gained = 0.5 if rating.label == TIE else float(rating.label != SECOND)
        in_order = rating.first < rating.second
        item = rating.prompt, rating.turn, *_sorted(rating)
        found[item][in_order].append(gained if in_order else 1 - gained)
        shown.append((rating.prompt, gained))
    if not shown:
        raise InputError(f"{rater} has no rating that could be parsed.")
    return found, shown


def _sorted(rating: Rating) -> tuple[str, str]:
    return min(rating.first, rating.second), max(rating.first, rating.second)


def _category(points: float, count: int) -> int:
    return EVEN if 2 * points == count else BEST if 2 * points > count else WORST


def _majority(name: str, members: Sequence[str], spoken: Mapping[str, Mapping[Item, int]]) -> dict[Item, int]:
    if unknown := [member for member in members if member not in spoken]:
        raise InputError(f"The majority {name} has no rater {unknown[0]!r}; the raters are {', '.join(spoken)}.")
    if name in spoken:
        raise InputError(f"{name} is a rater already; call the majority something else.")
    votes: dict[Item, Counter[int]] = defaultdict(Counter)
    for member in members:
        for item, verdict in spoken[member].items():
            votes[item][verdict] += 1
    found = {}
    for item, counts in votes.items():
        (verdict, most), *others = counts.most_common()
        found[item] = EVEN if others and others[0][1] == most else verdict
    return found


def _orders(own: Mapping[Item, Mapping[bool, Sequence[float]]], prompts: Mapping[str, int]) -> NDArray[np.int64]:
    rows = [
        [prompts[item[0]], *(_category(sum(by_order[shown]), len(by_order[shown])) for shown in (True, False))]
        for item, by_order in own.items()
        if by_order.get(True) and by_order.get(False)
    ]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
