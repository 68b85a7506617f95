"""What the judgements say about each pair, and about the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourbit.evaluate.bootstrap import bootstrap_interval
from fourbit.evaluate.judge.length import control_length
from fourbit.evaluate.judge.ratings import Judgement

__all__ = ["summarize"]

Array = NDArray[np.float64]


def summarize(judgements: Sequence[Judgement], *, mode: str) -> dict[str, Any]:
    """Everything that is counted, as JSON.

    Returns:
        unparsed: the share of replies that could not be read.
        order_bias: see `_order_bias`; None where nothing can be said.
        pairs: one for each pair, see `_pair`.
    """
    pairs = dict.fromkeys(judgement.request.pair for judgement in judgements)
    unparsed = sum(judgement.verdict.label == -1 for judgement in judgements)
    return {
        "unparsed": unparsed / len(judgements) if judgements else 0.0,
        "order_bias": _order_bias(judgements),
        "pairs": [
            _pair(pair, [judgement for judgement in judgements if judgement.request.pair == pair], mode)
            for pair in pairs
        ],
    }


def _pair(pair: tuple[str, str], judgements: Sequence[Judgement], mode: str) -> dict[str, Any]:
    """Of one pair, from the view of its first system.

    Returns:
        wins, ties, losses, unparsed; the same in `orders` for each order of presentation; share: of the points, a tie
        being half a one, with low and high over prompts; length_controlled: see `control_length`; in score mode also
        `scores`.
    """
    parsed = [judgement for judgement in judgements if judgement.verdict.label != -1]
    found: dict[str, Any] = {"first": pair[0], "second": pair[1], **_counts(judgements)}
    found["orders"] = [
        {"shown_first": pair[order - 1], **_counts([each for each in judgements if each.request.order == order])}
        for order in (1, 2)
    ]
    found |= {"share": None, "low": None, "high": None, "length_controlled": None}
    if parsed:
        points = np.array([judgement.points for judgement in parsed])
        found |= _interval(parsed, points)
        difference = np.array([_longer_by(judgement) for judgement in parsed])
        order = np.array([1.0 if judgement.request.order == 1 else -1.0 for judgement in parsed])
        controlled = control_length(points, difference, order, _prompt_numbers(parsed))
        found["length_controlled"] = None if controlled is None else asdict(controlled)
    if mode == "scores":
        found["scores"] = _scores(parsed)
    return found


def _counts(judgements: Sequence[Judgement]) -> dict[str, int]:
    points = [judgement.points for judgement in judgements]
    return {
        "wins": points.count(1.0),
        "ties": points.count(0.5),
        "losses": points.count(0.0),
        "unparsed": sum(judgement.verdict.label == -1 for judgement in judgements),
    }


def _longer_by(judgement: Judgement) -> float:
    """Characters that the answer of the pair's first system is longer than the other."""
    first, second = len(judgement.request.first.text), len(judgement.request.second.text)
    return float(first - second if judgement.request.order == 1 else second - first)


def _prompt_numbers(judgements: Sequence[Judgement]) -> NDArray[np.int64]:
    numbers = {key: number for number, key in enumerate(dict.fromkeys(str(each.request.id) for each in judgements))}
    return np.array([numbers[str(judgement.request.id)] for judgement in judgements])


def _by_prompt(judgements: Sequence[Judgement], columns: Array) -> Array:
    """[n, C] rows of judgements, summed over those of one prompt: what is drawn independently."""
    numbers = _prompt_numbers(judgements)
    sums = np.zeros((int(numbers.max()) + 1, columns.shape[1]))
    np.add.at(sums, numbers, columns)
    return sums


def _ratio(sums: Array) -> Array:
    return sums[:, 0] / np.maximum(sums[:, 1], 1e-12)


def _interval(judgements: Sequence[Judgement], values: Array) -> dict[str, float]:
    """The mean of some values, and its bootstrap interval over prompts."""
    rows = _by_prompt(judgements, np.stack([values, np.ones_like(values)], axis=1))
    low, high = bootstrap_interval(_ratio, rows)
    return {"share": float(values.mean()), "low": low, "high": high}


def _scores(parsed: Sequence[Judgement]) -> dict[str, Any] | None:
    """Mean scores, and what share of the second system's sum the first system reaches; by order and over both."""
    if not parsed:
        return None
    values = np.array([judgement.scores for judgement in parsed], dtype=np.float64)
    order = np.array([judgement.request.order for judgement in parsed])
    low, high = bootstrap_interval(_ratio, _by_prompt(parsed, values))
    first, second = values.mean(axis=0)
    return {
        "first_mean": float(first),
        "second_mean": float(second),
        "share_of_second": _share(values),
        "low": low,
        "high": high,
        "shown_first": _share(values[order == 1]),
        "shown_second": _share(values[order == 2]),
    }


def _share(values: Array) -> float | None:
    sums = values.sum(axis=0)
    return float(sums[0] / sums[1]) if len(values) and sums[1] else None


def _order_bias(judgements: Sequence[Judgement]) -> dict[str, Any] | None:
    """How far the verdict hangs on who is shown first.

    Returns:
        compared: pairs of answers that were judged in both orders; flipped: the share of them whose verdict was another
        in the other order; reversed: the share where both orders preferred the answer in the same place; first_share:
        the share of all points that went to the answer shown first (½ if the order did not matter), low and high.
    """
    parsed = [judgement for judgement in judgements if judgement.verdict.label != -1]
    if not parsed:
        return None
    shown_first = np.array([{1: 1.0, 2: 0.0, 3: 0.5}[judgement.verdict.label] for judgement in parsed])
    interval = _interval(parsed, shown_first)
    both: dict[tuple[object, ...], dict[int, float]] = {}
    for judgement in parsed:
        request = judgement.request
        both.setdefault((str(request.id), *request.pair), {})[request.order] = judgement.points
    compared = [found for found in both.values() if len(found) == 2]
    changes = [abs(found[1] - found[2]) for found in compared]
    return {
        "compared": len(compared),
        "flipped": sum(change > 0 for change in changes) / len(compared) if compared else None,
        "reversed": sum(change == 1 for change in changes) / len(compared) if compared else None,
        "first_share": interval["share"],
        "low": interval["low"],
        "high": interval["high"],
    }
