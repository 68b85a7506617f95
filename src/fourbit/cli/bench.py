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
            metavar="WHAT,…",
            help="What to measure: machine, ops, load, step, or a part of ops; of a --shape: step, decode, memory."
            " Default: all of it.",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="PEER,…",
            help="Whom to measure beside us: bitsandbytes, torchao, unsloth (on a GPU), llama_cpp (on a CPU), or none."
            " Default: those that are installed.",
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A model's shape, such as llama-7b, with random weights made in 4 bits."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Keep only so many layers of the shape.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Samples of each contender in a round.")] = None,
    out: Annotated[Path | None, typer.Option("--output", metavar="CSV", help="Add the rows to this file.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, one sample: does it run at all?")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure nothing; only say what would be.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Measure our kernels and training step beside each peer.

    Contenders take turns on this machine, each in a process of its own. Keep the machine quiet meanwhile; all of it
    takes about half an hour on two cores. With --shape, a training step, decoding and peak memory of a model of that
    shape are measured on the GPU, if there is one, and nothing is downloaded.
    """
    with output.result(as_json) as show:
        from fourbit.bench import registry, rows, run

        if shape is None and layers is not None:
            raise InputError("--layers cuts a shape; name one with --shape.")
        if shape is not None:
            _bench_shape(shape, layers, what, peers, repeats, out, quick, dry_run, show)
            return
        cases = registry.all_cases(_words(what), quick=quick)
        chosen = _peers(peers, gpu=False)
        if dry_run:
            plan = {
                case.name: [one.name for one in case.contenders if one.needs in (None, *chosen)] for _, case in cases
            }
            show({"cases": plan}, lambda: output.facts("Would be measured", {k: "; ".join(v) for k, v in plan.items()}))
            return
        _check_output(out, quick)
        with output.progress() as progress:
            measured = run.measure(cases, peers=chosen, repeats=repeats, quick=quick, progress=progress)
        found = [case for _, case in cases]
        show(_keys(found, measured), lambda: _tables(found, measured, quick=quick))
        if out is not None:
            rows.append(out, measured.rows)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def _bench_shape(
    shape: str,
    layers: int | None,
    what: str | None,
    peers: str | None,
    repeats: int | None,
    out: Path | None,
    quick: bool,
    dry_run: bool,
    show: output.Show,
) -> None:
    from fourbit.bench import environment, rows
    from fourbit.bench.device import shaped, summary

    words = _words(what)
    if repeats is not None and repeats < 1:
        raise InputError(f"The number of repeats is {repeats}; it must be at least 1.")
    device = environment.usable_accelerator() if environment.accelerators() else ""
    shaped.check(shape, layers, words, gpu=bool(device))
    chosen = _peers(peers, gpu=bool(device))
    if dry_run:
        plan = shaped.plan(shape, words, chosen)
        show({"cases": plan}, lambda: output.facts("Would be measured", {k: "; ".join(v) for k, v in plan.items()}))
        return
    _check_output(out, quick)
    with output.progress() as progress:
        measured = shaped.measure(
            shape,
            layers=layers,
            what=words,
            peers=chosen,
            repeats=repeats,
            quick=quick,
            device_name=device,
            tell=lambda line: progress(line, 0, 0),
        )
    found = list(summary.cases_of(measured.rows).values())
    show(_keys(found, measured), lambda: _tables(found, measured, quick=quick))
    if out is not None:
        rows.append(out, measured.rows)


def _check_output(out: Path | None, quick: bool) -> None:
    from fourbit.bench import rows

    if out is not None and quick:
        raise InputError("Rows of --quick are no measurements; leave --output out.")
    if out is not None:
        rows.check(out)


def _peers(text: str | None, *, gpu: bool) -> list[str]:
    from fourbit.bench import environment
    from fourbit.bench.peers import UNSLOTH
    from fourbit.bench.registry import PEERS

    if text is None:
        return environment.installed_peers(gpu=gpu)
    wanted = [word for word in _words(text) or [] if word != "none"]
    for name in wanted:
        if name not in PEERS:
            raise InputError(f"{name!r} is no peer that is measured; choose from {', '.join(PEERS)}, none.")
    if UNSLOTH in wanted and not gpu:
        raise InputError("unsloth runs on a GPU only, and what was asked for is measured on the CPU; leave it out.")
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
