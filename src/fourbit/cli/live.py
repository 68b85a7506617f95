"""How a training run is watched: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from fourbit.train.events import Began, Evaluated, Event, Noted, Said, Saved, Stepped
from fourbit.words import duration, size

__all__ = ["Watcher"]

LINES = 20
"""How many plain lines a run of any length has."""

SILENCE_S = 60
"""But one at least every so often."""


class Watcher:
    """Shows the events of a run on stderr; use it as a context and pass it as `on_event`."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._said_at = time.monotonic()
        self._said_share = 0

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, (Said, Noted)):
            self._say(event.sentence)
        elif isinstance(event, Began):
            self._begin(event)
        elif isinstance(event, Stepped):
            self._step(event)
        elif isinstance(event, Evaluated):
            self._evaluate(event)
        elif isinstance(event, Saved):
            self._describe(f"saved {event.path.name}")

    def _say(self, sentence: str) -> None:
        if self._bar is not None:
            self._bar.console.print(sentence, markup=False, highlight=False)
        else:
            print(sentence, file=sys.stderr, flush=True)
        self._said_at = time.monotonic()

    def _begin(self, event: Began) -> None:
        if not sys.stderr.isatty():
            return
        from rich import progress
        from rich.console import Console

        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.TextColumn("{task.fields[facts]}"),
        ]
        self._bar = progress.Progress(*columns, console=Console(stderr=True, highlight=False), transient=True)
        self._task = self._bar.add_task("training", total=event.steps, completed=event.step, facts="")
        self._bar.start()

    def _describe(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def _step(self, event: Stepped) -> None:
        facts = _facts(event)
        if self._bar is not None:
            self._bar.update(self._task, description="training", completed=event.step, facts="  ".join(facts))
            return
        share = event.step * LINES // event.steps
        silent = time.monotonic() - self._said_at > SILENCE_S
        if event.step == 1 or share != self._said_share or silent:
            self._said_share = share
            self._say(f"step {event.step}/{event.steps}  {'  '.join(facts)}")

    def _evaluate(self, event: Evaluated) -> None:
        if event.loss is None:
            self._describe(f"evaluating {event.done}/{event.total}")
        else:
            self._say(f"step {event.step}  evaluation loss {event.loss:.4f}")


def _facts(event: Stepped) -> list[str]:
    facts = [f"loss {event.loss:.4f}", f"lr {event.learning_rate:.2g}"]
    if event.tokens_per_second is not None:
        facts.append(f"{event.tokens_per_second:,.0f} tokens/s")
    facts.append(size(event.memory_bytes))
    if event.seconds_left is not None:
        facts.append(f"{duration(event.seconds_left)} left")
    return facts
