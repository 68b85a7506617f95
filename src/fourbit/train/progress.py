"""What a run measures of itself: tokens, time and memory."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

__all__ = ["Meter", "memory_bytes", "peak_bytes"]

WARM_UP_STEPS = 2
"""The first steps of a process, which fill caches and are not counted in its rate."""


@dataclass
class Meter:
    """Counts tokens and the time of steps, without that of evaluation and saving.

    Attributes:
        tokens: without padding, over the whole run.
        seconds: in steps, over the whole run.
        loss_sum: the sum of the losses of all steps that were logged.
        logged_steps: how many those are; steps without a number for a loss are none of them.
    """

    tokens: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    logged_steps: int = 0
    steps_here: int = 0
    timed_tokens: int = 0
    timed_seconds: float = 0.0
    _started: float = 0.0
    _tokens_of_step: int = 0

    def start_step(self, tokens: int) -> None:
        """Its batches were asked for at `start_clock`, and hold so many tokens."""
        self._tokens_of_step = tokens

    def start_clock(self) -> None:
        """A step begins with getting its batches."""
        self._started = time.perf_counter()

    def end_step(self) -> None:
        """The parameters have changed."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the step started must be done before the clock is read
        elapsed = time.perf_counter() - self._started
        self.steps_here += 1
        self.tokens += self._tokens_of_step
        self.seconds += elapsed
        if self.steps_here > WARM_UP_STEPS:
            self.timed_tokens += self._tokens_of_step
            self.timed_seconds += elapsed

    @property
    def tokens_per_second(self) -> float | None:
        """Over all counted steps; None before the first of them is done."""
        return self.timed_tokens / self.timed_seconds if self.timed_seconds else None

    def seconds_left(self, steps: int) -> float | None:
        """What `steps` more are expected to take; None until a counted step is done."""
        counted = self.steps_here - WARM_UP_STEPS
        return steps * self.timed_seconds / counted if counted > 0 else None

    def save(self, path: Path) -> None:
        """Write what a resumed run has to go on counting from."""
        kept = {name: value for name, value in asdict(self).items() if name in _OF_THE_RUN}
        path.write_text(json.dumps(kept), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Meter:
        """Read what `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: found[name] for name in _OF_THE_RUN})


_OF_THE_RUN = ("tokens", "seconds", "loss_sum", "logged_steps")


def memory_bytes() -> int:
    """What is allocated on the GPU, or what this process holds where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most that `memory_bytes` has been in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    from fourbit.models.process import peak_resident_bytes

    return peak_resident_bytes()
