"""What can be measured, and against whom.

Importing a case imports no torch: each contender is set up in a process of its own, so that its memory, its allocator
and whatever it does at import are its own, and the process that compares stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["LIMIT", "OURS", "TUNED_MALLOC", "Bar", "Case", "Contender", "Measure", "Share", "Task"]

OURS, LIMIT = "fourbit", "limit:"
"""What the names of our contenders, and of those that measure the machine itself, begin with."""

TUNED_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 30),
}
"""glibc told to keep freed memory: what a user can do, without changing a line, for a peer bound by page faults."""


class Task(NamedTuple):
    """What a contender does.

    Attributes:
        call: the work that is timed.
        check: a number from the result of `call`, which has to agree between contenders; computed off the clock.
    """

    call: Callable[[], Any]
    check: Callable[[Any], float]


class Measure(NamedTuple):
    """How seconds per call become a number for people.

    Attributes:
        unit: of that number.
        amount: units of work in one call, or units in a second where `is_rate` is false.
        is_rate: whether more is better.
    """

    unit: str
    amount: float
    is_rate: bool = True

    def of(self, seconds: float) -> float:
        """The number for one call that took so long."""
        return self.amount / seconds if self.is_rate else self.amount * seconds


class Share(NamedTuple):
    """What a contender draws from a limit of the machine.

    Attributes:
        limit: the contender of the same case that measures the limit.
        amount: what one call needs, in the unit whose rate that contender measures.
    """

    limit: str
    amount: float


@dataclass(frozen=True)
class Contender:
    """One implementation of a case.

    Attributes:
        name: begins with `OURS`, with `LIMIT`, or with the name of a peer.
        setup: prepares everything off the clock, in the contender's process, given the folder that the case's fixture
            filled; returns what is to be timed.
        needs: the package without which it is left out, if it is a peer.
        environment: variables set for its process.
        measure: in place of the case's own.
        share: what it draws from a limit.
    """

    name: str
    setup: Callable[[Path], Task]
    needs: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    measure: Measure | None = None
    share: Share | None = None


class Bar(NamedTuple):
    """What we ask of ourselves.

    Attributes:
        kind: `speed`: how many times as fast as `against` we are, at least; `memory`: our peak as a part of theirs, at
            most; `share`: our share of the limit `against`, at least; `value`: what we measure, in the case's unit, at
            most.
        against: a contender; empty for a `value`.
        bound: the ratio.
        ours: which of our contenders it is about.
    """

    kind: str
    against: str
    bound: float
    ours: str = OURS

    def met(self, value: float) -> bool:
        """Whether a ratio passes."""
        return value <= self.bound if self.kind in ("memory", "value") else value >= self.bound


@dataclass(frozen=True)
class Case:
    """One thing to measure under several contenders.

    Attributes:
        name: short, of letters and dashes; what rows are found by.
        title: for people, with shapes.
        measure: what rows hold.
        contenders: ours first; they take turns.
        bars: what we ask of ourselves.
        repeats: samples of each contender in a round.
        rounds: times that each contender's process is started anew.
        sample_s: seconds that a sample should last at least; short calls are repeated within it.
        warmup: samples that are thrown away at the start of a round.
        together: keep the processes of a round alive together and alternate by sample; otherwise one process after the
            other takes all its samples, and rounds alternate.
        tolerance: how far the `check` of two contenders may lie apart, relative.
        fixture: fills a temporary folder that every contender is given; run once, in a process of its own.
    """

    name: str
    title: str
    measure: Measure
    contenders: tuple[Contender, ...]
    bars: tuple[Bar, ...] = ()
    repeats: int = 7
    rounds: int = 1
    sample_s: float = 0.1
    warmup: int = 1
    together: bool = True
    tolerance: float = 0.02
    fixture: Callable[[Path], None] | None = None

    def contender(self, name: str) -> Contender:
        """The contender of that name."""
        return next(contender for contender in self.contenders if contender.name == name)

    def measure_of(self, contender: Contender) -> Measure:
        """What a contender's rows hold."""
        return contender.measure or self.measure
