"""The pages that are at hand: a budget of memory, and which page has to make room for the next.

A page is *acquired* to be worked on and *released* with a ticket of that work; meanwhile others can be *prefetched*.
Where there is no room, the page that was used least recently goes. It is written back only if it was changed.

Steps go through the pages forward and backward in turn (`paging.py`), so the least recently used page is the one that
will be wanted last: of N pages with room for S, each step moves N - S in and out. In one direction only, the same rule
would evict every page right before its turn and move all N.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fourbit.optim.moving import Mover, Store, Ticket

__all__ = ["PageCache", "TieredStore"]


@dataclass
class _Slot:
    """Memory for a page.

    Attributes:
        memory: [bytes] uint8, as large as the largest page.
        pending: what must be over before the memory is touched.
        held: somebody works on it.
        wanted: it was prefetched and not asked for yet.
        changed: it differs from what the store has.
    """

    memory: Tensor
    pending: list[Ticket] = field(default_factory=list)
    held: bool = False
    wanted: bool = False
    changed: bool = False


class PageCache:
    """A number of pages, of those in a store.

    Args:
        sizes_bytes: of each page.
        capacity: pages at hand at most; None for all, and then there need not be a store.
        make: memory of so many bytes, zeros.
        mover, store: where pages go and what carries them.

    Attributes:
        capacity: as given.
        moved_bytes: what was read from and written to the store.
    """

    def __init__(
        self,
        sizes_bytes: list[int],
        *,
        capacity: int | None,
        make: Callable[[int], Tensor],
        mover: Mover,
        store: Store | None,
    ) -> None:
        self.capacity, self.moved_bytes = capacity, 0
        self._sizes, self._make, self._mover, self._store = sizes_bytes, make, mover, store
        self._slots: OrderedDict[int, _Slot] = OrderedDict()  # by page, the least recently used first
        self._unused: list[_Slot] = []
        self._written: dict[int, Ticket] = {}
        self._lock = threading.RLock()

    @property
    def resident(self) -> list[int]:
        """The pages at hand, the least recently used first."""
        return list(self._slots)

    def reserve(self) -> None:
        """Take all memory that will be needed."""
        if self.capacity is None:
            if len(self._slots) < len(self._sizes):  # in one piece: a system gives larger pages of its own to it
                parts = self._make(sum(self._sizes)).split(self._sizes)
                self._slots = OrderedDict((page, _Slot(part)) for page, part in enumerate(parts))
            return
        missing = min(self.capacity, len(self._sizes)) - len(self._slots) - len(self._unused)
        self._unused += [_Slot(self._make(max(self._sizes)), [self._mover.mark()]) for _ in range(missing)]

    def prefetch(self, page: int) -> None:
        """Begin to bring a page, if there is room that nobody needs before it; one that is at hand stays."""
        with self._lock:
            self.reserve()
            slot = self._slots.get(page)
            if slot is None and (slot := self._room(urgent=False)) is not None:
                self._fill(slot, page)
            if slot is not None:
                slot.wanted = True

    def acquire(self, page: int, *, read: bool = True) -> Tensor:
        """[bytes] uint8 of a page, to be worked on until it is released.

        Args:
            read: False where all of it will be overwritten.
        """
        with self._lock:
            self.reserve()
            slot = self._slots.get(page)
            if slot is None:
                slot = self._room(urgent=True)
                if slot is None:
                    raise RuntimeError("Every page at hand is in use.")
                self._fill(slot, page, read=read)
            self._slots.move_to_end(page)
            slot.wanted, slot.held = False, True
            for ticket in slot.pending:
                ticket.wait()
            slot.pending = []
            return slot.memory[: self._sizes[page]]

    def release(self, page: int, done: Ticket, *, changed: bool) -> None:
        """Let go of a page.

        Args:
            done: the work on it, which may still be under way.
            changed: whether it was written to.
        """
        with self._lock:
            slot = self._slots[page]
            slot.held, slot.changed, slot.pending = False, slot.changed or changed, [done]

    def settle(self) -> None:
        """Forget what was prefetched for nothing, so that it can make room."""
        for slot in self._slots.values():
            slot.wanted = False

    def expect(self, page: int) -> None:
        """Tell the store that a page will be asked for soon."""
        if self._store is not None and page not in self._slots and page in self._written:
            self._store.expect(page)

    def _room(self, *, urgent: bool) -> _Slot | None:
        """A slot that is free now, or will be; None if all are needed. Urgency takes one that is only wanted."""
        if self._unused:
            return self._unused.pop()
        free = [(slot.wanted, page) for page, slot in self._slots.items() if not slot.held]
        page = next((page for wanted, page in free if not wanted), free[0][1] if free and urgent else None)
        return None if page is None else self._evict(page)

    def _evict(self, page: int) -> _Slot:
        slot, store = self._slots.pop(page), self._store
        assert store is not None
        if slot.changed:
            memory = slot.memory[: self._sizes[page]]
            ticket = self._mover.submit(lambda: store.write(page, memory), after=slot.pending, outward=True)
            slot.pending, slot.changed, self._written[page] = [ticket], False, ticket
            self.moved_bytes += memory.numel()
        return slot

    def _fill(self, slot: _Slot, page: int, *, read: bool = True) -> None:
        """Begin to bring a page into a slot; one that was never written is zeros."""
        if read and page not in self._written:
            memory = slot.memory
            slot.pending = [self._mover.submit(lambda: _clear(memory), after=slot.pending, outward=False)]
        if read and page in self._written:
            store, memory = self._store, slot.memory[: self._sizes[page]]
            assert store is not None
            after = [*slot.pending, self._written[page]]
            slot.pending = [self._mover.submit(lambda: store.read(page, memory), after=after, outward=False)]
            self.moved_bytes += memory.numel()
        self._slots[page] = slot


def _clear(memory: Tensor) -> None:
    if memory.is_cpu:
        memory.numpy().fill(0)  # torch would start threads of its own for the thread that this runs in
    else:
        memory.zero_()


class TieredStore:
    """A store that is itself a cache of another: pinned host memory under a budget, before a file.

    Args:
        cache: of the pages in host memory.
        mover: what carries pages between here and the tier above.
    """

    def __init__(self, cache: PageCache, mover: Mover) -> None:
        self._cache, self._mover = cache, mover

    def read(self, page: int, memory: Tensor) -> None:
        memory.copy_(self._cache.acquire(page), non_blocking=True)
        self._cache.release(page, self._mover.mark(), changed=False)

    def write(self, page: int, memory: Tensor) -> None:
        self._cache.acquire(page, read=False).copy_(memory, non_blocking=True)
        self._cache.release(page, self._mover.mark(), changed=True)

    def expect(self, page: int) -> None:
        self._cache.prefetch(page)
