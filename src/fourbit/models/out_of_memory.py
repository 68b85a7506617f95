"""When the memory does not suffice: know it, give back what is free, and take less at a time."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from fourbit.errors import InputError
from fourbit.kernels.native import library

__all__ = ["Halving", "MemoryLimitReached", "free_memory", "is_out_of_memory", "run_in_pieces"]

_LOG = logging.getLogger("fourbit")

P = TypeVar("P")
R = TypeVar("R")

_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
"""What torch says of memory that it did not get, where it raises a RuntimeError. That something is out of memory, or of
resources, is not enough: so is a kernel that asks for too much of a core's own memory, whatever the batch."""


class MemoryLimitReached(MemoryError):
    """The process would grow beyond the memory that the user allows it."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether less work at a time may help: the memory that there is, or that a user allows, is used up."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in _SAID):
            return True
        error = error.__cause__
    return False


def free_memory() -> None:
    """Give back what is free: unreachable tensors, torch's cache on a GPU, the workspaces and free memory of a CPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not isinstance(library.load(), str):
        library.release_freed_memory()


def run_in_pieces(
    whole: P, work: Callable[[P], R], *, cut: Callable[[P], Sequence[P]], make_smaller: Callable[[P, str], Sequence[P]]
) -> Iterator[tuple[P, R]]:
    """Do work piece by piece, and what does not fit into memory in smaller pieces.

    Args:
        cut: cuts a piece as small as pieces are known to have to be; gives it as it is where it is small enough.
        make_smaller: called with a piece that did not fit, and the first line of why, when nothing of the attempt is
            left in memory; gives what to do in its stead, or raises.

    Yields:
        the pieces that fitted, in order, and what the work gave.
    """
    waiting = deque([whole])
    while waiting:
        first, *rest = cut(waiting.popleft())
        waiting.extendleft(reversed(rest))
        piece, reason = first, ""
        try:
            result = work(piece)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
        else:
            yield piece, result
            continue
        free_memory()  # not before the error is gone, whose traceback holds all that was computed
        waiting.extendleft(reversed(make_smaller(piece, reason)))


class Halving:
    """Does batches of a list, a batch that does not fit into memory in halves, and then keeps to the smaller size.

    Attributes:
        most: items at a time; None while every batch fitted.

    Args:
        what: the items, as the user is told: "prompts".
        hint: what to change if one item alone does not fit.
    """

    def __init__(self, what: str, *, hint: str) -> None:
        self.most: int | None = None
        self._what, self._hint = what, hint

    def run(self, items: Sequence[P], work: Callable[[Sequence[P]], R]) -> Iterator[tuple[Sequence[P], R]]:
        """Yields the parts of `items` that were done at a time, in order, and what the work gave for each.

        Raises:
            InputError: one item alone does not fit.
        """
        before = self.most
        yield from run_in_pieces(items, work, cut=self._cut, make_smaller=self._halve)
        if self.most != before:
            _LOG.warning("out of memory: %s are taken %d at a time from here on.", self._what, self.most)

    def _cut(self, items: Sequence[P]) -> list[Sequence[P]]:
        size = self.most or len(items)
        return [items[start : start + size] for start in range(0, len(items), max(size, 1))] or [items]

    def _halve(self, items: Sequence[P], reason: str) -> list[Sequence[P]]:
        if len(items) <= 1:
            raise InputError(f"One of the {self._what} alone does not fit into memory ({reason[:200]}); {self._hint}.")
        self.most = (len(items) + 1) // 2
        return self._cut(items)
