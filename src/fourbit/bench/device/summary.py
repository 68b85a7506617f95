"""The short table at the end: every bar for which there are rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fourbit.bench import report, rows
from fourbit.bench.case import OURS, Case
from fourbit.bench.device import cases
from fourbit.bench.device.settings import NOTES, ROWS
from fourbit.bench.rows import Row
from fourbit.bench.run import disagreements

__all__ = ["cases_of", "lines", "notes"]


def cases_of(found: Iterable[Row]) -> dict[str, Case]:
    """The cases that rows are of, by name, with those of our variants that took part."""
    kept = list(found)
    prefix = cases.variant("")
    variants = sorted({row.contender.removeprefix(prefix) for row in kept if row.contender.startswith(prefix)})
    named = {row.case: cases.named(row.case, variants) for row in kept}
    return {name: case for name, case in named.items() if case is not None}


def lines(folder: Path) -> list[str]:
    """A line per bar, in order; a line that says so where there is none."""
    path = folder / ROWS
    found = rows.read(path) if path.exists() else []
    known = cases_of(found)
    told = []
    for name, case in known.items():
        mine = [row for row in found if row.case == name]
        standings = report.standings(case, mine)
        told += [f"{name:32} {one.sentence()}" for one in standings]
        told += [f"{name:32} {sentence}" for sentence in disagreements(case, mine)]
        best = _best_variant(mine)
        if best:
            told.append(f"{name:32} {best}")
    return told or ["No bar was measured."]


def notes(folder: Path) -> Sequence[str]:
    """What was left out or looks wrong."""
    path = folder / NOTES
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _best_variant(found: Sequence[Row]) -> str:
    """Says if another way of running the operation was more than 3% faster than the one that was chosen."""
    ours = next((row for row in found if row.contender == OURS), None)
    others = [row for row in found if row.contender.startswith(cases.variant(""))]
    if ours is None or not others:
        return ""
    is_rate = not ours.unit.endswith("s")  # of times, less is better
    best = (max if is_rate else min)(others, key=lambda row: row.median)
    gain = best.median / ours.median if is_rate else ours.median / best.median
    return f"{best.contender} is {gain:.2f}× as fast as the chosen way" if gain > 1.03 else ""
