"""Ctrl-C while a run goes on: the step is finished and saved; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

__all__ = ["Stop", "stopping_on_signals"]


@dataclass
class Stop:
    """Whether the run was asked to end."""

    requested: bool = False


@contextmanager
def stopping_on_signals(on_request: Callable[[], None]) -> Iterator[Stop]:
    """Within the block Ctrl-C, and the signal that a scheduler sends before it takes a machine away, only ask.

    Args:
        on_request: called at the first of them. The second raises KeyboardInterrupt wherever the run is.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only there can a signal be caught
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        on_request()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
