"""Measures cases: starts a process per contender, lets them take turns, and gathers rows."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fourbit.bench import environment
from fourbit.bench.case import LIMIT, OURS, Case, Contender
from fourbit.bench.peers import BITSANDBYTES, PACKAGES
from fourbit.bench.process import ContenderFailed, Process, started
from fourbit.bench.rows import Row
from fourbit.bench.worker import FIXTURE
from fourbit.errors import InputError

__all__ = ["Run", "Samples", "as_row", "disagreements", "measure"]

PAUSE_S = 0.02
"""Between two turns, for the threads of the one before to go to sleep."""


QUIET = 0.05
"""What others may take of the processors before a sentence is due."""


@dataclass
class Run:
    """What a run gathered.

    Attributes:
        rows: one per case and contender, in the order of the cases.
        notes: sentences about what was left out or looks wrong.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure(
    cases: list[tuple[str, Case]],
    *,
    peers: Collection[str],
    repeats: int | None = None,
    quick: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Run:
    """Measure cases, one after the other, and each case's contenders in turns.

    Args:
        cases: as `registry.all_cases` gives them, with the same `quick`.
        peers: the packages to compare with.
        repeats: samples per round, in place of each case's own.
        progress: called with the case, the samples taken, and the samples in all.

    Raises:
        InputError: `repeats` below 1. RuntimeError: one of our own contenders failed.
    """
    if repeats is not None and repeats < 1:
        raise InputError(f"The number of repeats is {repeats}; it must be at least 1.")
    run = Run()
    absent = {name for name in peers if find_spec(name) is None}
    for name in sorted(absent):
        install = "'fourbit[bench]'" if name == BITSANDBYTES else PACKAGES.get(name, name)
        run.notes.append(f"{name} is not installed, so it is left out; pip install {install} brings it.")
    facts = environment.facts()
    for module, case in cases:
        chosen = [item for item in case.contenders if item.needs is None or item.needs in set(peers) - absent]
        disturbance = environment.Disturbance()
        taken = _Case(module, case, chosen, repeats or case.repeats, quick, run.notes, progress).samples()
        others = disturbance.share()
        measured = [contender for contender in chosen if taken[contender.name].seconds]
        rows = [as_row(facts, case, contender, taken, others) for contender in measured]
        run.notes += disagreements(case, rows)
        if others is not None and others > QUIET and not quick:
            run.notes.append(
                f"Others took {others:.0%} of the processors during {case.name}; do not trust its numbers."
            )
        run.rows += rows
    return run


@dataclass
class Samples:
    """What one contender gave in one case."""

    seconds: list[float] = field(default_factory=list)
    check: float | None = None
    level: str = ""
    ready: list[int] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    device_peaks: list[int] = field(default_factory=list)


@dataclass
class _Case:
    """One case being measured."""

    module: str
    case: Case
    contenders: list[Contender]
    repeats: int
    quick: bool
    notes: list[str]
    progress: Callable[[str, int, int], None] | None

    def samples(self) -> dict[str, Samples]:
        """Every contender's samples, by name; empty for a peer that failed."""
        self.taken = {contender.name: Samples() for contender in self.contenders}
        with tempfile.TemporaryDirectory(prefix="fourbit-bench-") as name:
            folder = Path(name)
            if self.case.fixture is not None:
                with started(self._arguments(FIXTURE, folder), {}) as process:
                    process.wait()
            for _ in range(self.case.rounds):
                if self.case.together:
                    self._round(self.contenders, folder)
                else:
                    for contender in self.contenders:
                        self._round([contender], folder)
        return self.taken

    def _round(self, contenders: list[Contender], folder: Path) -> None:
        """Start these contenders, sample them in turns, and end them."""
        with ExitStack() as stack:
            running: list[tuple[Contender, Process]] = []
            for contender in contenders:
                with self._failures(contender):
                    arguments = self._arguments(contender.name, folder)
                    process = stack.enter_context(started(arguments, contender.environment))
                    ready = process.answer()
                    self.taken[contender.name].level = ready["level"]
                    self.taken[contender.name].ready.append(ready["ready_rss_bytes"])
                    running.append((contender, process))
            for turn in range(self.case.warmup + self.repeats):
                for contender, process in running:
                    with self._failures(contender):
                        self._sample(contender, process, keep=turn >= self.case.warmup)
            for contender, process in running:
                with self._failures(contender):
                    self.taken[contender.name].peaks.append(process.ask("end")["peak_rss_bytes"])

    def _sample(self, contender: Contender, process: Process, *, keep: bool) -> None:
        if process.failed:
            return
        time.sleep(PAUSE_S)
        sample = process.ask("sample")
        samples = self.taken[contender.name]
        if samples.check is None:
            samples.check = sample["check"]
        if keep:
            samples.seconds.append(sample["seconds"])
        if self.progress is not None:
            done = sum(len(samples.seconds) for samples in self.taken.values())
            self.progress(self.case.name, done, self.repeats * self.case.rounds * len(self.contenders))

    @contextmanager
    def _failures(self, contender: Contender) -> Iterator[None]:
        """A peer that fails is left out with a sentence; ours must not."""
        try:
            yield
        except ContenderFailed as error:
            if contender.needs is None:
                raise RuntimeError(f"{contender.name} failed in {self.case.name}: {error}") from error
            self.taken[contender.name] = Samples()
            sentence = f"{contender.name} failed in {self.case.name} and is left out: {error}"
            if sentence not in self.notes:
                self.notes.append(sentence)

    def _arguments(self, contender: str, folder: Path) -> list[str]:
        return [self.module, self.case.name, contender, "quick" if self.quick else "full", str(folder)]


def as_row(
    facts: Mapping[str, Any], case: Case, contender: Contender, taken: Mapping[str, Samples], others: float | None
) -> Row:
    """What the samples of a contender come to.

    Args:
        facts: see `environment.facts`; with `device`, where one did the work.
        taken: every contender's samples; its limit's among them, if its share of that is wanted.
    """
    samples = taken[contender.name]
    measure = case.measure_of(contender)
    values = [measure.of(seconds) for seconds in samples.seconds]
    share = None
    if contender.share is not None and (found := taken.get(contender.share.limit)) and found.seconds:
        limit = case.measure_of(case.contender(contender.share.limit))
        possible = limit.of(statistics.median(found.seconds))
        share = contender.share.amount / statistics.median(samples.seconds) / possible
    return Row(
        **facts,
        level=samples.level,
        case=case.name,
        contender=contender.name,
        unit=measure.unit,
        median=statistics.median(values),
        minimum=min(values),
        maximum=max(values),
        samples=len(values),
        rounds=case.rounds,
        share=share,
        share_of="" if contender.share is None or share is None else contender.share.limit,
        ready_rss_bytes=round(statistics.median(samples.ready or [0])),
        peak_rss_bytes=round(statistics.median(samples.peaks or [0])),
        peak_device_bytes=round(statistics.median(samples.device_peaks or [0])),
        check=samples.check or 0.0,
        others=others,
    )


def disagreements(case: Case, rows: list[Row]) -> list[str]:
    """A sentence for each peer whose result is not ours: then the times do not compare."""
    ours = next((row for row in rows if row.contender == OURS), None)
    if ours is None:
        return []
    return [
        f"{row.contender} and {OURS} disagree in {case.name}: {row.check:.6g} and {ours.check:.6g} came out."
        for row in rows
        if not row.contender.startswith(LIMIT) and not _close(row.check, ours.check, case.tolerance)
    ]


def _close(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) <= tolerance * max(abs(a), abs(b))
