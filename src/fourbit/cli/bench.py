"""`fourbit bench`: our kernels and training step beside each installed peer, in one run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import output
from fourbit.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.bench.case import Case
    from fourbit.bench.run import Run

__all__ = ["bench"]


def bench(
    what: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT,…", help="What to measure: machine, ops, load, step, or a part of ops. Default: all of it."
        ),
    ] = None,
    peers: Annotated[
        str, typer.Option(metavar="PEER,…", help="Whom to measure beside us: bitsandbytes, or none.")
    ] = "bitsandbytes",
    repeats: Annotated[int | None, typer.Option(help="Samples of each contender in a round.")] = None,
    out: Annotated[Path | None, typer.Option("--output", metavar="CSV", help="Add the rows to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, one sample: does it run at all?")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure nothing; only say what would be.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Measure our kernels and training step beside each peer.

    Contenders take turns on this machine, each in a process of its own. Keep the machine quiet meanwhile; all of it
    takes about half an hour on two cores.
    """
    with output.result(as_json) as show:
        from fourbit.bench import registry, rows, run

        cases = registry.all_cases(_words(what), quick=quick)
        chosen = _peers(peers)
        if dry_run:
            plan = {
                case.name: [one.name for one in case.contenders if one.needs in (None, *chosen)] for _, case in cases
            }
            show({"cases": plan}, lambda: output.facts("Would be measured", {k: "; ".join(v) for k, v in plan.items()}))
            return
        if out is not None and quick:
            raise InputError("Rows of --quick are no measurements; leave --output out.")
        if out is not None:
            rows.check(out)
        with output.progress() as progress:
            measured = run.measure(cases, peers=chosen, repeats=repeats, quick=quick, progress=progress)
        found = [case for _, case in cases]
        show(_keys(found, measured), lambda: _tables(found, measured, quick=quick))
        if out is not None:
            rows.append(out, measured.rows)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _peers(text: str) -> list[str]:
    from fourbit.bench.registry import PEERS

    wanted = [word for word in _words(text) or [] if word != "none"]
    for name in wanted:
        if name not in PEERS:
            raise InputError(f"{name!r} is no peer that is measured; choose from {', '.join(PEERS)}, none.")
    return wanted


def _keys(cases: list[Case], measured: Run) -> dict[str, Any]:
    from fourbit.bench import report

    grouped = {case.name: [row for row in measured.rows if row.case == case.name] for case in cases}
    return {
        "rows": [asdict(row) for row in measured.rows],
        "bars": [
            {"case": standing.case, **standing.bar._asdict(), "value": standing.value, "met": standing.met}
            for case in cases
            for standing in report.standings(case, grouped[case.name])
        ],
        "notes": measured.notes,
    }


def _tables(cases: list[Case], measured: Run, *, quick: bool) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from fourbit.bench import report

    parts: list[RenderableType] = []
    for case in cases:
        rows = [row for row in measured.rows if row.case == case.name]
        table = Table(title=case.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for index, name in enumerate(report.header(case)):
            table.add_column(name, justify="right" if index else "left", style="" if index else "cyan", no_wrap=True)
        for line in report.lines(case, rows):
            table.add_row(*line)
        parts.append(table)
        for standing in report.standings(case, rows) if not quick else ():
            parts.append(Text(f"  {standing.sentence()}", style="green" if standing.met else "bold red"))
        parts.append("")
    return Group(*parts, *(Text(note) for note in measured.notes))
