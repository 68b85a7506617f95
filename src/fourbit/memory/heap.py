"""How far glibc's heap grows under a sequence of allocations: what a CPU run holds beyond what is alive in it.

`fourbit.prepare` lets the C library keep freed memory (`keep_freed_memory`), so all tensors share one heap that never
shrinks. torch asks for aligned memory: glibc finds a hole with `ALIGNING` bytes to spare and gives the two ends back.
Small objects (the nodes of autograd's graph, mostly) move into those ends. So once a tensor is freed, its hole is a
little too short for the next tensor of the same size until the small objects are gone as well, and the heap grows:
with checkpointing and many tokens by as much again as is alive.

This plays that: best fit, neighbours joined, the top grows, and an end is free only `SETTLING` allocations after its
tensor. `SETTLING` is the one number that was fitted (docs/log.md: eleven runs, of which then
ten were within 6% of the whole peak, and one at 10%).

Source: malloc/malloc.c of glibc 2.36, `_int_memalign`.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable

__all__ = ["Heap", "Step", "high_water"]

GRAIN = 64
HEADER = 16
ALIGNING = 96
"""What `memalign(64)` asks for beyond the size: the alignment and the smallest chunk."""

SETTLING = 60

Event = tuple[int, int]
"""A number, and the bytes that it takes (above 0) or gives back (below)."""


class Heap:
    """Holes by size and by place.

    Attributes:
        most: the largest extent so far, in bytes.
    """

    def __init__(self) -> None:
        self.most = 0
        self._top = 0
        self._clock = 0
        self._by_size: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._begin_of_end: dict[int, int] = {}
        self._held: dict[object, tuple[int, int, int]] = {}
        self._ends: deque[tuple[int, int, int]] = deque()

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def names(self) -> list[object]:
        """Of all that is held."""
        return list(self._held)

    def take(self, name: object, size_bytes: int) -> None:
        """Allocate."""
        self._clock += 1
        while self._ends and self._ends[0][0] <= self._clock:
            _, begin, size = self._ends.popleft()
            self._join(begin, size)
        size = -(-size_bytes // GRAIN) * GRAIN + HEADER
        wanted = size + ALIGNING
        place = bisect.bisect_left(self._by_size, (wanted, -1))
        end = ALIGNING
        if place < len(self._by_size):
            hole, begin = self._by_size[place]
            self._remove(begin)
            if hole - wanted >= GRAIN:
                self._insert(begin + wanted, hole - wanted)
            else:
                end = hole - size
        else:
            begin = self._top
            self._top += wanted
            self.most = max(self.most, self._top)
        self._held[name] = begin, size, end

    def give_back(self, name: object) -> None:
        """Free."""
        begin, size, end = self._held.pop(name)
        self._ends.append((self._clock + SETTLING, begin + size, end))
        self._join(begin, size)

    def _join(self, begin: int, size: int) -> None:
        if begin in self._begin_of_end:
            before = self._begin_of_end[begin]
            begin, size = before, size + self._remove(before)
        if begin + size in self._size_at:
            size += self._remove(begin + size)
        if begin + size == self._top:
            self._top = begin
        else:
            self._insert(begin, size)

    def _insert(self, begin: int, size: int) -> None:
        self._size_at[begin] = size
        self._begin_of_end[begin + size] = begin
        bisect.insort(self._by_size, (size, begin))

    def _remove(self, begin: int) -> int:
        size = self._size_at.pop(begin)
        del self._begin_of_end[begin + size]
        del self._by_size[bisect.bisect_left(self._by_size, (size, begin))]
        return size


class Step:
    """The allocations of one forward and backward pass.

    Args:
        events: in their order.
        kept: numbers of buffers that stay for good once they are there.
        gradients: numbers of what is left for the optimizer.
    """

    def __init__(self, events: Iterable[Event], kept: Iterable[int], gradients: Iterable[int]) -> None:
        self.events, self.kept, self.gradients = tuple(events), frozenset(kept), frozenset(gradients)

    def play(self, heap: Heap, number: int, *, accumulates: bool) -> None:
        """Run it once.

        Args:
            number: of the pass.
            accumulates: its gradients are added to those that are there.
        """
        for key, size_bytes in self.events:
            if key in self.kept:
                name: object = key
                if number:
                    continue
            elif key in self.gradients:
                if accumulates:
                    continue
                name = "gradient", key
            else:
                name = number, key
            if size_bytes > 0:
                heap.take(name, size_bytes)
            elif size_bytes < 0 and name in heap:
                heap.give_back(name)
        for name in heap.names():
            if isinstance(name, tuple) and name[0] == number:
                heap.give_back(name)


def high_water(step: Step, *, passes: int, states: Iterable[int]) -> int:
    """How large the heap becomes over a few steps.

    Args:
        passes: through the model for one update; two stand for any more.
        states: the sizes of what the optimizer allocates after the first step, and keeps.
    """
    heap, number = Heap(), 0
    for update in range(2):
        for index in range(min(passes, 2)):
            step.play(heap, number, accumulates=index > 0)
            number += 1
        if update == 0:
            for index, size_bytes in enumerate(states):
                heap.take(("state", index), size_bytes)
        for name in heap.names():
            if isinstance(name, tuple) and name[0] == "gradient":
                heap.give_back(name)
    return heap.most
