"""`report.html`: a ranking, what it rests on, and the answers themselves, as one file that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.evaluate.answers import System
from fourbit.evaluate.compare.contenders import Contender
from fourbit.evaluate.picture import win_matrix
from fourbit.evaluate.ranking import Ranking
from fourbit.evaluate.ratings import FIRST, SECOND, TIE, Rating
from fourbit.pages import render_page, short_name

__all__ = ["Shown", "headline", "write_report"]

TEMPLATE = "report.html.j2"

MOST_PROMPTS = 100
"""How many prompts are shown with all their answers; more only make the page slow."""


@dataclass(frozen=True)
class Shown:
    """What the page shows.

    Attributes:
        contenders, systems: of the same names, in the same order.
        rankings: by who ranked.
        ratings: of all raters, for what is said beside each answer.
        record: what `ranking.json` holds.
    """

    contenders: Sequence[Contender]
    systems: Sequence[System]
    rankings: Mapping[str, Ranking]
    ratings: Sequence[Rating]
    record: Mapping[str, Any]


def write_report(shown: Shown) -> str:
    """The text of the page."""
    record = shown.record
    return render_page(
        Path(__file__).with_name(TEMPLATE),
        title=short_name(record["folder"]),
        record=record,
        tiles=_tiles(record, shown.rankings),
        findings=[(name, headline(ranking)) for name, ranking in shown.rankings.items()],
        rankings=[
            (name, _rows(ranking), _ticks(ranking), _matrix(ranking), ranking)
            for name, ranking in shown.rankings.items()
        ],
        samples=_samples(shown),
        most=MOST_PROMPTS,
        share=_with_interval,
        estimate=_estimate,
    )


def _with_interval(found: Mapping[str, Any] | None) -> str:
    """A share of points, and its interval."""
    if found is None or found["share"] is None:
        return "–"
    return f"{found['share']:.0%} ({found['low']:.0%} to {found['high']:.0%})"


def _estimate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def headline(ranking: Ranking) -> str:
    """The result in one sentence."""
    first, second = ranking.standings[0], ranking.standings[1]
    if not first.untold:
        ahead = next(pair for pair in ranking.pairs if {pair.first, pair.second} == {first.model, second.model})
        return (
            f"{first.model} is best, {ahead.difference:.0f} points ahead of {second.model}"
            f" (95% interval {ahead.low:.0f} to {ahead.high:.0f})."
        )
    if len(first.untold) == len(ranking) - 1 and all(len(row.untold) == len(ranking) - 1 for row in ranking):
        return f"The {len(ranking)} systems cannot be told apart with {ranking.prompts:,} prompts."
    others = ", ".join(first.untold)
    return f"{first.model} stands first, but cannot be told apart from {others} with {ranking.prompts:,} prompts."


def _tiles(record: Mapping[str, Any], rankings: Mapping[str, Ranking]) -> list[tuple[str, str, str]]:
    """Name, value and a remark of what stands at the top."""
    source = short_name(record["prompts"]["source"])
    tiles = [
        ("systems", f"{len(record['systems']):,}", "models, adapters and answers"),
        ("prompts", f"{record['prompts']['count']:,}", source),
    ]
    for name, ranking in rankings.items():
        tiles.append((f"judgements by {name}", f"{ranking.matches:,}", f"on {ranking.prompts:,} prompts"))
    if (judge := record["judge"]) is not None:
        if (bias := judge["order_bias"]) is not None:
            tiles.append(("shown first", f"{bias['first_share']:.0%}", "of the judge's points; 50% without bias"))
        tiles.append(("unparsed", f"{judge['unparsed']:.1%}", "of the judge's replies"))
    return tiles


def _scale(ranking: Ranking) -> tuple[float, float, float]:
    """Where the axis begins and ends, and how far its ticks are apart: five or so."""
    low, high = min(row.low for row in ranking), max(row.high for row in ranking)
    width = max(high - low, 10.0)
    step = 10.0 ** math.floor(math.log10(width / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if width / (step * factor) <= 6)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def _share(value: float, ranking: Ranking) -> float:
    begin, end, _ = _scale(ranking)
    return 100 * (value - begin) / (end - begin)


def _ticks(ranking: Ranking) -> list[tuple[float, str]]:
    begin, end, step = _scale(ranking)
    count = round((end - begin) / step)
    return [(100 * number / count, f"{begin + number * step:.0f}") for number in range(count + 1)]


def _rows(ranking: Ranking) -> list[dict[str, Any]]:
    numbers = {row.model: number for number, row in enumerate(ranking, start=1)}
    return [
        {
            "place": numbers[row.model],
            "name": row.model,
            "elo": f"{row.elo:.0f}",
            "interval": f"{row.low:.0f} to {row.high:.0f}",
            "left": _share(row.low, ranking),
            "width": max(_share(row.high, ranking) - _share(row.low, ranking), 0.3),
            "dot": _share(row.elo, ranking),
            "matches": row.matches,
            "untold": ", ".join(str(numbers[other]) for other in row.untold),
        }
        for row in ranking
    ]


def _matrix(ranking: Ranking) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """For each row's model a cell for each other: the points, who is better, and how strong its colour is."""
    return [
        (
            row.model,
            [("", "", 0.0) if math.isnan(share) else (f"{100 * share:.0f}", *_colour(float(share))) for share in line],
        )
        for row, line in zip(ranking, win_matrix(ranking), strict=True)
    ]


def _colour(share: float) -> tuple[str, float]:
    return ("more" if share > 0.5 else "less" if share < 0.5 else "", 55 * abs(2 * share - 1))


def _samples(shown: Shown) -> list[dict[str, Any]]:
    """Prompts with all answers, and what share of the points each got there."""
    points = _points(shown.ratings)
    keys = list(shown.systems[0].answers)
    found = []
    for key in keys[:MOST_PROMPTS]:
        answers = [(system.name, system.answers.get(key)) for system in shown.systems]
        known = next((answer.question for _, answer in answers if answer is not None and answer.question), "")
        shares = {name: points.get((key, name)) for name, _ in answers}
        best = max((share for share in shares.values() if share is not None), default=None)
        found.append(
            {
                "id": key,
                "question": known,
                "answers": [
                    {
                        "name": name,
                        "text": "" if answer is None else answer.text,
                        "missing": answer is None,
                        "share": None if shares[name] is None else f"{shares[name]:.0%}",
                        "best": best is not None and best > 0.5 and shares[name] == best,
                    }
                    for name, answer in answers
                ],
            }
        )
    return found


def _points(ratings: Sequence[Rating]) -> dict[tuple[str, str], float]:
    """(prompt, system) -> the share of the points that it got there."""
    sums: dict[tuple[str, str], list[float]] = {}
    for rating in ratings:
        if rating.label in (FIRST, SECOND, TIE):
            first = {FIRST: 1.0, SECOND: 0.0, TIE: 0.5}[rating.label]
            sums.setdefault((rating.prompt, rating.first), []).append(first)
            sums.setdefault((rating.prompt, rating.second), []).append(1 - first)
    return {key: sum(found) / len(found) for key, found in sums.items()}
