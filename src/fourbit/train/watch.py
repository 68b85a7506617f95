"""A memory limit on a CPU, which the system itself does not keep.

Linux promises more memory than there is, and kills a process when the promise falls due. So a run that may use so much
is looked at between its modules, where a step can be given up without leaving anything half-done: the resident size,
plus what the step took at most from one look to the next, must stay below the limit. See
docs/decisions/0010-memory-is-watched-between-modules.md for what else was tried.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fourbit.models.out_of_memory import MemoryLimitReached
from fourbit.words import size

__all__ = ["MemoryWatch", "resident_bytes"]


class MemoryWatch:
    """Looks at what the process holds.

    Args:
        limit_bytes: what it may grow to.
        measure: gives its size in bytes.
    """

    def __init__(self, limit_bytes: int, *, measure: Callable[[], int] | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._measure = measure or resident_bytes
        self._last = self._grown = 0

    def begin(self) -> None:
        """A batch begins: how much it takes at a time is learned anew, as its shape is another."""
        self._last, self._grown = self._measure(), 0

    def look(self) -> None:
        """See whether there is room for as much as came at once before.

        Raises:
            MemoryLimitReached: there is not.
        """
        held = self._measure()
        self._grown, self._last = max(self._grown, held - self._last), held
        if held + self._grown > self.limit_bytes:
            raise MemoryLimitReached(f"the process holds {size(held)}, and `memory` allows {size(self.limit_bytes)}")

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look before every module of a model runs, forward and where checkpointing runs it again.

        Adapted layers are one module each: a hook on what is inside would keep them from their fused path.
        """
        hooks = [module.register_forward_pre_hook(self._before) for module in _outside_of_adapters(model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        self.look()


def _outside_of_adapters(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    if not isinstance(module, BaseTunerLayer):
        for child in module.children():
            yield from _outside_of_adapters(child)


def resident_bytes() -> int:
    """What this process holds in memory."""
    file = _statm()
    if file is not None:
        return int(os.pread(file, 128, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


@cache
def _statm() -> int | None:
    """Open for good, as it is read between the modules of every step."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
