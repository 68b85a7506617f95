"""What a run tells while it goes on. Who shows it, and how, is up to whoever passed `on_event`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Began", "Evaluated", "Event", "Noted", "OnEvent", "Said", "Saved", "Stepped"]


@dataclass(frozen=True)
class Said:
    """One sentence: what was recognised, what was chosen, what was left out."""

    sentence: str


@dataclass(frozen=True)
class Began:
    """The first step comes next.

    Attributes:
        step: steps done before, by the run that this one takes up.
        steps: of the whole run.
    """

    step: int
    steps: int


@dataclass(frozen=True)
class Stepped:
    """An optimizer step was done.

    Attributes:
        loss: per labelled token, the mean since the last such event.
        tokens: without padding, in this run so far.
        tokens_per_second: as in `TrainResult`; None in the first two steps.
        memory_bytes: that the process holds, or that is allocated on the GPU.
        seconds_left: of training, without evaluation; None while it is not known.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens: int
    tokens_per_second: float | None
    memory_bytes: int
    seconds_left: float | None


@dataclass(frozen=True)
class Evaluated:
    """The held-out examples were scored; `done` of `total` batches while it goes on, with `loss` None."""

    step: int
    done: int
    total: int
    loss: float | None


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete."""

    step: int
    path: Path


@dataclass(frozen=True)
class Noted:
    """Something happened that the run's history keeps.

    Attributes:
        kind: "out_of_memory", "skipped", "diverged" or "no_score".
    """

    step: int
    kind: str
    sentence: str


Event = Said | Began | Stepped | Evaluated | Saved | Noted
OnEvent = Callable[[Event], None]
