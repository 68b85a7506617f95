"""Rows of a run beside what we ask of ourselves: tables for the terminal, and docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fourbit.bench.case import LIMIT, Bar, Case
from fourbit.bench.rows import Row

__all__ = ["PREFACE", "Standing", "header", "lines", "number", "standings", "tables"]


@dataclass(frozen=True)
class Standing:
    """How we stand against one bar.

    Attributes:
        case: its name.
        bar: see `bench.case.Bar`.
        value: the ratio that was measured.
        met: whether it passes.
    """

    case: str
    bar: Bar
    value: float
    met: bool

    def sentence(self) -> str:
        """What is asked and what was measured."""
        ours, against = self.bar.ours, self.bar.against
        against = against.removeprefix(f"{LIMIT} ")
        if self.bar.kind == "share":
            text = f"{ours}: {self.value:.0%} of {against} (asked: {self.bar.bound:.0%} or more)"
        elif self.bar.kind == "memory":
            text = f"{ours}: {self.value:.2f}× the peak memory of {against} (asked: {self.bar.bound:g}× or less)"
        elif self.bar.kind == "value":
            text = f"{ours}: {self.value:.3g} (asked: {self.bar.bound:g} or less)"
        else:
            text = f"{ours}: {self.value:.2f}× as fast as {against} (asked: {self.bar.bound:g}× or more)"
        return f"{text}: {'met' if self.met else 'MISSED'}"


def standings(case: Case, rows: Iterable[Row]) -> list[Standing]:
    """Each bar of a case for which there are rows."""
    by_name = {row.contender: row for row in rows}
    found = []
    for bar in case.bars:
        ours, against = by_name.get(bar.ours), by_name.get(bar.against or bar.ours)
        if ours is None or against is None:
            continue
        value = _ratio(bar, case, ours, against)
        if value is not None:
            found.append(Standing(case.name, bar, value, bar.met(value)))
    return found


def header(case: Case) -> tuple[str, ...]:
    """The names of the columns of `lines`; the fourth says how many times as fast we are."""
    return case.measure.unit, "median", "range", "ours", "limit", "peak MB"


def lines(case: Case, rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """A line per contender, to stand under `header`."""
    rows = list(rows)
    ours = next((row for row in rows if row.contender == case.contenders[0].name), None)
    return [_line(case, row, ours) for row in rows]


def tables(cases: Iterable[Case], latest: Mapping[str, list[Row]]) -> str:
    """A part of docs/benchmarks.md: each case's table of its last run, and each bar with what became of it.

    Args:
        cases: all that there are, in the order of the page.
        latest: the rows of each case's last run.
    """
    parts = []
    for case in cases:
        rows = latest.get(case.name)
        if not rows:
            continue
        parts.append(f"## {case.title}\n")
        parts.append(_table(header(case), lines(case, rows)))
        parts += [f"- {standing.sentence()}" for standing in standings(case, rows)] or ["No bar; for comparison."]
        parts.append(f"\n{_provenance(rows)}\n")
    return "\n".join(parts) if parts else "There are no rows yet.\n"


def number(value: float) -> str:
    """Three significant digits, and thousands grouped."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.2e}"


PREFACE = """# Benchmarks

Written by `python benchmarks/write_docs.py` out of the rows in `benchmarks/results/`; do not edit by hand.

All contenders of a case are measured in one run and take turns, each in a process of its own; medians, with the
smallest and the largest sample. Times belong to the machine named under each table: quote the ratios. "Ours" says how
many times as fast as a contender the first line is. "Limit" is the part of the machine's own bandwidth or product rate
that a contender draws; the limit is measured in the same turns and stands in the last line. "Tuned malloc" is glibc
told to keep freed memory (`MALLOC_MMAP_MAX_=0` and a high trim threshold): without it a peer that allocates what it
returns is bound by page faults, where we reuse our own buffers. "Peak MB" is the largest resident size of the
whole process, libraries included, in 10⁶ bytes.

On a GPU, "peak MB" is what torch's allocator held at most.

Why a bar is missed stands in [the log](log.md). Run it again with `make bench`, or a part of it with
`fourbit bench --what ops`; on a GPU with `make gpu`. `fourbit bench --shape llama-3.1-8b` measures a training step,
decoding and peak memory of a model of any shape that it knows, without a download.
"""


def _ratio(bar: Bar, case: Case, ours: Row, against: Row) -> float | None:
    if bar.kind == "value":
        return ours.median
    if bar.kind == "share":
        return ours.share if ours.share_of == bar.against else None
    if bar.kind == "memory":
        return _peak_bytes(ours) / _peak_bytes(against)
    return _times_as_fast(case, ours, against)


def _times_as_fast(case: Case, ours: Row, against: Row) -> float:
    is_rate = case.measure_of(case.contender(ours.contender)).is_rate
    return ours.median / against.median if is_rate else against.median / ours.median


def _line(case: Case, row: Row, ours: Row | None) -> tuple[str, ...]:
    comparable = ours is not None and row is not ours and row.unit == ours.unit and not _is_limit(row)
    return (
        row.contender,
        f"{number(row.median)}{'' if row.unit == case.measure.unit else f' {row.unit}'}",
        f"{number(row.minimum)}–{number(row.maximum)}",
        f"{number(_times_as_fast(case, ours, row))}×" if comparable and ours is not None else "",
        "" if row.share is None else f"{row.share:.0%}",
        "" if _is_limit(row) else f"{_peak_bytes(row) / 1e6:,.0f}",
    )


def _peak_bytes(row: Row) -> int:
    """Of the memory that the work was done in."""
    return row.peak_device_bytes if row.device else row.peak_rss_bytes


def _is_limit(row: Row) -> bool:
    return row.contender.startswith(LIMIT)


def _provenance(rows: list[Row]) -> str:
    first = rows[0]
    level = next((row.level for row in rows if row.level), "")
    libraries = ", ".join(
        f"{name} {version}"
        for name, version in (
            ("fourbit", f"{first.fourbit} at {first.commit or 'no commit'}"),
            ("torch", first.torch),
            ("transformers", first.transformers),
            ("peft", first.peft),
            ("bitsandbytes", first.bitsandbytes),
            ("with", first.libraries if first.device else ""),
            ("Python", first.python),
        )
        if version
    )
    machine = f"{first.device}, " if first.device else ""
    others = "" if first.others is None else f" Others took {first.others:.0%} of the processors meanwhile."
    return (
        f"{first.run[:10]}: {machine}{first.cpu}, {first.cores} cores, {first.memory_bytes / 1e9:.0f} GB,"
        f" {first.kernel}"
        f"{f', our kernels at {level}' if level else ''}; {libraries}; {first.samples} samples in {first.rounds} "
        f"round{'s' if first.rounds != 1 else ''}.{others}"
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}\n{body}\n"
