"""The pages of all states on one device: how many tiers there are, and the way through them, step by step.

    device memory  <->  host memory  <->  a file

The first tier is where the parameters are. On a CPU that is the host's memory, and the file comes right behind it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.errors import InputError
from fourbit.optim.cache import PageCache, TieredStore
from fourbit.optim.layout import Kind, Page, lay_out
from fourbit.optim.moving import FileStore, HostStore, Mover, Store, StreamMover, ThreadMover, host_memory
from fourbit.optim.update import PageViews
from fourbit.words import size

__all__ = ["PAGE_ELEMENTS", "Budget", "PagedStates"]

PAGE_ELEMENTS = 1 << 20
"""Elements of a page where nobody says: 8 MiB of 32-bit states, which a PCIe bus carries in some 0.2 ms."""

UNMOVED_ELEMENTS = 1 << 26
"""The same where no page ever moves and none is copied to be computed with: each costs a kernel's start."""

AHEAD = 2
"""Pages that are fetched while one is worked on: one on its way in while the other one's predecessor leaves."""

LEAST_PAGES = 4
"""Pages that a budget should hold where the size of a page is left to us."""


@dataclass(frozen=True)
class Budget:
    """How much memory the pages may take, and what lies behind.

    Attributes:
        device_bytes: on each device; None for all that is needed.
        host_bytes: in the host's memory; None for all that is needed.
        folder: where the file of a budgeted host is.
        page_elements: of a page; None leaves it to us.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None
    folder: str | os.PathLike[str] | None = None
    page_elements: int | None = None

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
                stated = name.replace("_bytes", "_budget_bytes")
                raise InputError(f"`{stated}` is {value!r}; it must be a whole number of bytes above 0, or None.")
        if self.host_bytes is not None and self.folder is None:
            raise InputError("`host_budget_bytes` needs a `folder` for the pages that do not fit.")
        if self.folder is not None and self.host_bytes is None:
            raise InputError("`folder` is for the pages beyond `host_budget_bytes`; give that as well.")

    def page_bytes(self, kinds: Sequence[Kind], *, scratch: bool) -> int:
        """The size of a page that each of these kinds can be put into.

        Args:
            scratch: whether parts of a page are copied for every update.

        Raises:
            InputError: a budget has no room for one.
        """
        least = max(kind.unit_bytes for kind in kinds)
        budgets = {"device_budget_bytes": self.device_bytes, "host_budget_bytes": self.host_bytes}
        given = {name: value for name, value in budgets.items() if value is not None}
        if self.page_elements is None:
            usual = PAGE_ELEMENTS if given or scratch else UNMOVED_ELEMENTS
            wanted = max(kind.size_bytes(usual) for kind in kinds)
            wanted = min([wanted, *(value // LEAST_PAGES for value in given.values())])
        else:
            unit = max(kind.unit for kind in kinds)
            if isinstance(self.page_elements, bool) or self.page_elements <= 0 or self.page_elements % unit:
                raise InputError(f"`page_elements` is {self.page_elements}; it must be a multiple of {unit}.")
            wanted = max(kind.size_bytes(self.page_elements) for kind in kinds)
        page = max(wanted, least)
        for name, value in given.items():
            if value < page:
                raise InputError(
                    f"`{name}` is {value}, and one page takes {page} bytes; give it so much, or a smaller"
                    f" `page_elements`."
                )
        return page


class PagedStates:
    """The pages of the parameters of one device.

    Args:
        device: of the parameters.
        parameters: (index, elements, kind) of each.
        budget: see there.
        scratch: whether some of them are copied for every update, since they have 16 bits.

    Attributes:
        device: as given.
        pages: all of them.
        kinds: of the parameters, by index.
        scratch_elements: of the fp32 memory that an update needs besides, by name; see `update.Stepping`.

    Raises:
        InputError: a budget has no room for a page, or the folder or its disk none for the file.
    """

    def __init__(
        self,
        device: torch.device,
        parameters: Sequence[tuple[int, int, Kind]],
        budget: Budget,
        *,
        scratch: bool = False,
    ) -> None:
        self.device, self.kinds = device, {index: kind for index, _, kind in parameters}
        page_bytes = budget.page_bytes([kind for _, _, kind in parameters], scratch=scratch)
        self.pages = lay_out(parameters, page_bytes=page_bytes)
        self.scratch_elements: dict[str, int] = {}
        if scratch:
            most = max((page.elements for page in self.pages), default=0)
            unmastered = any(not kind.master for kind in self.kinds.values())
            self.scratch_elements = {"grads": most, "params": most} if unmastered else {"grads": most}
        self._forward = True
        self._views: dict[int, PageViews] = {}
        self._cache, self._mover = self._tiers(budget)

    @property
    def size_bytes(self) -> int:
        """The bytes of all pages."""
        return sum(page.size_bytes for page in self.pages)

    @property
    def moved_bytes(self) -> int:
        """What went in and out of the first tier so far."""
        return self._cache.moved_bytes

    def _tiers(self, budget: Budget) -> tuple[PageCache, Mover]:
        sizes = [page.size_bytes for page in self.pages]
        total, largest = sum(sizes), max(sizes, default=1)
        on_gpu = self.device.type == "cuda"
        mover: Mover = StreamMover(self.device) if on_gpu else ThreadMover()
        upper, host = budget.device_bytes, budget.host_bytes
        if not on_gpu and upper is None:
            upper, host = host, None
        elif upper is not None and host is not None:
            host = None if total <= host else host
        store: Store | None = None
        if upper is not None and total > upper:
            if not on_gpu and budget.device_bytes is None:
                assert budget.folder is not None
                store = FileStore(budget.folder, pages=len(sizes), page_bytes=largest)
            elif host is None:
                store = HostStore(len(sizes), largest, pinned=on_gpu)
            else:
                store = self._host_tier(sizes, host, budget, mover)
        capacity = None if store is None or upper is None else upper // largest
        return PageCache(sizes, capacity=capacity, make=self._make, mover=mover, store=store), mover

    def _host_tier(self, sizes: list[int], host_bytes: int, budget: Budget, mover: Mover) -> Store:
        """Host memory under a budget, and a file behind it."""
        assert budget.folder is not None
        largest, pinned = max(sizes), self.device.type == "cuda"
        below = PageCache(
            sizes,
            capacity=host_bytes // largest,
            make=lambda size_bytes: host_memory(size_bytes, pinned=pinned and size_bytes > 0),
            mover=ThreadMover(),
            store=FileStore(budget.folder, pages=len(sizes), page_bytes=largest),
        )
        return TieredStore(below, mover)

    def _make(self, size_bytes: int) -> Tensor:
        try:
            memory = torch.zeros(size_bytes, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise  # whoever trains may make room and try again
            raise InputError(
                f"The system gives no {size(size_bytes)} more for the optimizer's state; set a budget."
            ) from error
        self._mover.watch(memory)
        return memory

    def reserve(self) -> None:
        """Take all memory that the first tier will need."""
        self._cache.reserve()

    def views(self, page: Page, memory: Tensor, params: list[Tensor]) -> PageViews:
        """The parts of a page that is at hand; kept while it stays where it is."""
        kept = self._views.get(page.index)
        if kept is None or kept.memory.data_ptr() != memory.data_ptr():
            kept = self._views[page.index] = PageViews(page, memory, params)
        return kept

    def visit(self, wanted: Sequence[Page], *, changes: bool) -> Generator[tuple[Page, Tensor], None, None]:
        """Go through pages, each with its [bytes] uint8 on the device; the next ones are fetched meanwhile.

        Every other time the way is backward, so that it begins with the pages that are at hand; see `cache.py`.

        Close it if it may be left early: the page that was worked on is not free before.

        Args:
            wanted: some pages, in their order.
            changes: whether the caller writes to them.
        """
        cache = self._cache
        ahead = len(wanted) if cache.capacity is None else min(AHEAD, cache.capacity - 1)
        order = list(wanted if self._forward else reversed(wanted))
        self._forward = not self._forward
        try:
            for place, page in enumerate(order):
                memory = cache.acquire(page.index)
                try:
                    if cache.capacity is not None:
                        for following in order[place + 1 : place + 1 + ahead]:
                            cache.prefetch(following.index)
                        for following in order[place + 1 + ahead : place + 1 + 2 * AHEAD]:
                            cache.expect(following.index)
                    yield page, memory
                finally:
                    cache.release(page.index, self._mover.mark(), changed=changes)
        finally:
            cache.settle()
