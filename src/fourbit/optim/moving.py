"""How pages get from one place to another: what carries them, and where they stay meanwhile.

A *mover* runs copies beside the computing, in the order in which they were asked for, and gives a *ticket* for each. On
a GPU these are streams and events: nothing makes the processor wait. Elsewhere it is a thread, and files are read and
written there, outside of Python's lock. A *store* is where pages are that are not in a cache: host memory, or a file.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from fourbit.errors import InputError
from fourbit.words import size

__all__ = [
    "DONE",
    "FileStore",
    "HostStore",
    "Mover",
    "Store",
    "StreamMover",
    "ThreadMover",
    "Ticket",
    "host_memory",
    "open_reserved",
]

CHUNK_BYTES = 64 << 20
"""Host memory is taken in pieces of about so much: torch rounds a pinned piece up to a power of two."""


class Ticket(Protocol):
    """Something under way."""

    def wait(self) -> None:
        """Let what the caller computes next begin only after it: on a GPU the processor goes on."""

    def finish(self) -> None:
        """Wait here until it is over."""


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""

    finish = wait


DONE: Ticket = _Done()
"""The ticket of what is over already."""


class _Promise:
    """The ticket of a thread's work."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    finish = wait


class _Event:
    """The ticket of a stream's work."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def finish(self) -> None:
        self._event.synchronize()


class Mover(Protocol):
    """What carries pages."""

    def submit(self, copy: Callable[[], None], *, after: Sequence[Ticket], outward: bool) -> Ticket:
        """Run a copy once everything in `after` is over."""

    def mark(self) -> Ticket:
        """A ticket for all that was computed so far."""

    def watch(self, memory: Tensor) -> None:
        """Be told of memory that it will copy from and to."""


class ThreadMover:
    """One thread: for copies between the host's memory and a file."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fourbit-pages")

    def submit(self, copy: Callable[[], None], *, after: Sequence[Ticket], outward: bool) -> Ticket:
        del outward  # a page that is read usually takes the place of the one that was written before it

        def run() -> None:
            for ticket in after:
                ticket.finish()
            copy()

        return _Promise(self._thread.submit(run))

    def mark(self) -> Ticket:
        return DONE  # the processor has computed it by now

    def watch(self, memory: Tensor) -> None:
        """The thread holds what it copies."""


class StreamMover:
    """Two streams of a GPU, one for each direction, as the bus carries both at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def submit(self, copy: Callable[[], None], *, after: Sequence[Ticket], outward: bool) -> Ticket:
        with torch.cuda.stream(self._outward if outward else self._inward):
            for ticket in after:
                ticket.wait()
            copy()
            return self.mark()

    def mark(self) -> Ticket:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return _Event(event, self._device)

    def watch(self, memory: Tensor) -> None:
        for stream in (self._inward, self._outward):
            memory.record_stream(stream)  # or torch would give it away, once freed, under a copy that still runs


class Store(Protocol):
    """Where pages are that are not in a cache. Called by a mover, which sees to the order."""

    def read(self, page: int, memory: Tensor) -> None:
        """Fill [bytes] uint8 with a page that was written before."""

    def write(self, page: int, memory: Tensor) -> None:
        """Keep a page."""

    def expect(self, page: int) -> None:
        """Be told that a page will be read soon."""


class HostStore:
    """Host memory without a budget, pinned for a GPU.

    Args:
        pages, page_bytes: as many, of this size at most.
        pinned: whether a GPU is to copy from it.

    Raises:
        InputError: the system does not give so much.
    """

    def __init__(self, pages: int, page_bytes: int, *, pinned: bool) -> None:
        self._page_bytes, self._together = page_bytes, max(1, CHUNK_BYTES // page_bytes)
        counts = [min(self._together, pages - first) for first in range(0, pages, self._together)]
        self._chunks = [host_memory(count * page_bytes, pinned=pinned) for count in counts]

    def _home(self, page: int, size_bytes: int) -> Tensor:
        number, place = divmod(page, self._together)
        begin = place * self._page_bytes
        return self._chunks[number][begin : begin + size_bytes]

    def read(self, page: int, memory: Tensor) -> None:
        memory.copy_(self._home(page, memory.numel()), non_blocking=True)

    def write(self, page: int, memory: Tensor) -> None:
        self._home(page, memory.numel()).copy_(memory, non_blocking=True)

    def expect(self, page: int) -> None:
        """It is here."""


def host_memory(size_bytes: int, *, pinned: bool) -> Tensor:
    """[size_bytes] uint8 in the host's memory, with anything in it.

    Raises:
        InputError: the system does not give so much.
    """
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        kind = "pinned memory" if pinned else "memory"
        raise InputError(
            f"The system gives no {size(size_bytes)} more of {kind} to page the optimizer's state to; set a"
            " `host_budget_bytes` and a `folder`, or take state_bits=8."
        ) from error


class FileStore:
    """A file without a name in a folder: it is gone when the process is, however that ends.

    Its whole size is taken from the disk at once, so that a disk that is too small shows before the first step. It is
    read and written explicitly: pages of a mapped file would count as resident, and the system would choose which stay.

    Raises:
        InputError: the folder cannot be written to, or the disk has too little room.
    """

    def __init__(self, folder: str | os.PathLike[str], *, pages: int, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        total = pages * page_bytes
        try:
            self._file = open_reserved(folder, total)
        except OSError as error:
            raise InputError(
                f"The folder {os.fspath(folder)!r} cannot take the optimizer's {size(total)} of pages:"
                f" {error.strerror}; give another `folder`, or take state_bits=8."
            ) from error
        weakref.finalize(self, self._file.close)

    def read(self, page: int, memory: Tensor) -> None:
        self._move(os.preadv, page, memory)

    def write(self, page: int, memory: Tensor) -> None:
        self._move(os.pwritev, page, memory)

    def _move(self, move: Callable[[int, Sequence[memoryview], int], int], page: int, memory: Tensor) -> None:
        left, place = memoryview(memory.numpy()), page * self._page_bytes  # type: ignore[arg-type]  # numpy's stubs
        while left:
            try:
                moved = move(self._file.fileno(), [left], place)
            except OSError as error:
                raise InputError(f"The optimizer's pages cannot be moved to or from disk: {error.strerror}.") from error
            if moved == 0:
                raise InputError("The file that the optimizer's state is paged to ends too soon.")
            left, place = left[moved:], place + moved

    def expect(self, page: int) -> None:
        """The system reads ahead by itself."""


def open_reserved(folder: str | os.PathLike[str], size_bytes: int) -> IO[bytes]:
    """A file without a name in a folder, which is made if need be, with room on the disk for so many bytes.

    Raises:
        OSError: the folder cannot be written to, or the disk has too little room.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # it lives as long as the pages do
    try:
        if size_bytes and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        else:
            file.truncate(size_bytes)
    except OSError:
        file.close()
        raise
    return file
