"""Writes docs/benchmarks.md and its pictures out of benchmarks/results/bench*.csv.

`python benchmarks/write_docs.py [--check]`: with `--check` nothing is written, and the exit code is 1 where the page is
not what the rows say. The pictures need matplotlib and are not checked, as another release of it draws other bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fourbit.bench import registry, report, rows
from fourbit.bench.case import Case
from fourbit.bench.device import summary
from fourbit.bench.rows import Row

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"

Part = tuple[str, dict[str, Case], dict[str, list[Row]]]
"""A device ("" for the CPU), its cases in the order of the page, and the rows of each one's last run."""


def parts() -> list[Part]:
    """The CPU, then each device that there are rows of."""
    found = [row for path in sorted(RESULTS.glob("bench*.csv")) for row in rows.read(path)]
    here = [row for row in found if not row.device]
    cases = {case.name: case for _, case in registry.all_cases()}
    made: list[Part] = [("", cases | summary.cases_of(here), rows.latest(here))]
    for device in sorted({row.device for row in found if row.device}):
        mine = [row for row in found if row.device == device]
        made.append((device, summary.cases_of(mine), rows.latest(mine)))
    return made


def rendered(pictures: Sequence[dict[str, str]] | None = None) -> str:
    """The page as the committed rows have it.

    Args:
        pictures: of each part: file -> question; None takes those that lie beside the page.
    """
    made = parts()
    shown = [_drawn_before(device) for device, *_ in made] if pictures is None else pictures
    pieces = [report.PREFACE]
    for (device, cases, latest), drawn in zip(made, shown, strict=True):
        if device:
            pieces.append(f"# On {device}\n")
        pieces += [f"{question}\n\n![{question}]({file})\n" for file, question in drawn.items()]
        pieces.append(report.tables(cases.values(), latest))
    return "\n".join(pieces)


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit code."""
    if arguments == ["--check"]:
        if not PAGE.exists() or PAGE.read_text() != rendered():
            print(f"{PAGE.relative_to(ROOT)} is not what the rows say; run `python benchmarks/write_docs.py`.")
            return 1
        return 0
    import plots

    drawn = [plots.pictures(cases, latest, PAGE.parent, _prefix(device)) for device, cases, latest in parts()]
    PAGE.write_text(rendered(drawn))
    return 0


def _prefix(device: str) -> str:
    """What the pictures' names begin with."""
    return "-".join(["benchmarks", *"".join(c if c.isalnum() else " " for c in device.lower()).split()])


def _drawn_before(device: str) -> dict[str, str]:
    """The pictures that the page shows already, so that a check needs no matplotlib."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    marked = [line.removeprefix("![").removesuffix(")").split("](") for line in lines if line.startswith("![")]
    return {file: question for question, file in marked if file.rpartition("-")[0] == _prefix(device)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
