"""Pages: how parameters are cut, which page makes room, in what order copies run, and what a disk can do wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.optim import PagedAdamW
from fourbit.optim.cache import PageCache
from fourbit.optim.layout import Kind, lay_out
from fourbit.optim.moving import DONE, FileStore, HostStore, ThreadMover, Ticket
from fourbit.optim.paging import Budget, PagedStates

KINDS = [Kind(bits, master) for bits in (32, 8) for master in (False, True)]
PAGE_BYTES = 64


@given(
    counts=st.lists(st.integers(0, 5000), max_size=12),
    kinds=st.lists(st.sampled_from(KINDS), min_size=12, max_size=12),
    units=st.integers(1, 9),
)
def test_every_element_has_one_place(counts: list[int], kinds: list[Kind], units: int) -> None:
    page_bytes = units * max(kind.unit_bytes for kind in KINDS)
    pages = lay_out([(i, n, kinds[i]) for i, n in enumerate(counts)], page_bytes=page_bytes)
    seen: dict[int, int] = dict.fromkeys(range(len(counts)), 0)
    for number, page in enumerate(pages):
        assert page.index == number
        assert page.elements % page.kind.unit == 0
        assert 0 < page.size_bytes <= page_bytes
        end = 0
        for part in page.segments:
            assert part.offset >= end
            assert part.offset % page.kind.unit == part.start % page.kind.unit == 0
            assert (part.start, page.kind) == (seen[part.parameter], kinds[part.parameter])
            seen[part.parameter], end = part.stop, part.offset + part.count
        assert end <= page.elements
        sections = page.kind.sections(torch.zeros(page.size_bytes, dtype=torch.uint8), page.elements)
        assert sum(section.nbytes for section in sections.values()) == page.size_bytes
    assert seen == dict(enumerate(counts))


class Recorder:
    """Runs copies when told to, and keeps the order: what a stream may do at its latest."""

    def __init__(self) -> None:
        self.waiting: list[Recorder.Work] = []

    class Work:
        def __init__(self, copy: Callable[[], None], after: Sequence[Ticket]) -> None:
            self._copy, self._after, self._over = copy, after, False

        def wait(self) -> None:
            if not self._over:
                self._over = True
                for ticket in self._after:
                    ticket.wait()
                self._copy()

        finish = wait

    def submit(self, copy: Callable[[], None], *, after: Sequence[Ticket], outward: bool) -> Ticket:
        del outward
        self.waiting.append(Recorder.Work(copy, list(after)))
        return self.waiting[-1]

    def mark(self) -> Ticket:
        return DONE

    def watch(self, memory: Tensor) -> None:
        """It holds what it copies."""


@pytest.mark.parametrize("late", [False, True], ids=["at once", "at the latest moment"])
@pytest.mark.parametrize("capacity", [1, 2, 3, 5])
@given(order=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), max_size=40))
def test_a_page_is_what_was_last_written_to_it(late: bool, capacity: int, order: list[tuple[int, bool, bool]]) -> None:
    """Whenever copies run between the moment they may and the moment they must, and whatever is fetched for nothing."""
    mover: Any = Recorder() if late else ThreadMover()
    cache = PageCache(
        [PAGE_BYTES] * 5,
        capacity=capacity,
        make=lambda size: torch.zeros(size, dtype=torch.uint8),
        mover=mover,
        store=HostStore(5, PAGE_BYTES, pinned=False),
    )
    expected = [0] * 5
    for turn, (page, fetch_next, change) in enumerate(order, 1):
        memory = cache.acquire(page)
        assert memory.tolist() == [expected[page]] * PAGE_BYTES
        if fetch_next:
            cache.prefetch((page + 1) % 5)
        if change:
            expected[page] = turn
            memory.fill_(turn)
        cache.release(page, DONE, changed=change)
        assert len(cache.resident) <= capacity


def test_the_least_recently_used_page_goes_and_a_wanted_one_stays() -> None:
    cache = PageCache(
        [PAGE_BYTES] * 6,
        capacity=3,
        make=lambda size: torch.zeros(size, dtype=torch.uint8),
        mover=ThreadMover(),
        store=HostStore(6, PAGE_BYTES, pinned=False),
    )
    for page in (0, 1, 2, 0):
        cache.acquire(page)
        cache.release(page, DONE, changed=True)
    assert cache.resident == [1, 2, 0]
    cache.prefetch(1)
    cache.acquire(3)
    assert cache.resident == [1, 0, 3]
    cache.acquire(4)
    assert cache.resident == [1, 3, 4]
    cache.acquire(5)  # nothing else is left but what is only wanted
    assert cache.resident == [3, 4, 5]
    with pytest.raises(RuntimeError, match="in use"):
        cache.acquire(0)


def test_pages_are_read_while_another_is_worked_on(tmp_path: Path) -> None:
    states = PagedStates(torch.device("cpu"), [(0, 64 * 8, Kind(32, False))], Budget(None, 4 * 512, tmp_path, 64))
    readers = set()
    read = FileStore.read

    def spied(self: FileStore, page: int, memory: Tensor) -> None:
        readers.add(threading.current_thread().name)
        read(self, page, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileStore, "read", spied)
        for _ in range(3):
            for page, memory in states.visit(states.pages, changes=True):
                assert page.size_bytes == memory.numel()
    assert len(readers) == 1
    assert readers.pop().startswith("fourbit-pages")


def test_a_file_has_no_name_and_all_of_its_room_at_once(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "made" / "anew", pages=3, page_bytes=4096)
    assert list((tmp_path / "made" / "anew").iterdir()) == []
    status = os.fstat(store._file.fileno())
    assert status.st_size == 3 * 4096 <= status.st_blocks * 512
    assert os.lseek(store._file.fileno(), 0, os.SEEK_CUR) == 0


def test_a_full_disk_shows_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, begin: int, count: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"cannot take the optimizer's 40\.4 kB of pages: No space left on device"):
        PagedAdamW([nn.Parameter(torch.zeros(5000))], page_elements=64, host_budget_bytes=512, folder=tmp_path)


def test_a_full_disk_shows_in_a_checkpoint_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an OSError: `fourbit train` goes on without that checkpoint."""
    param = nn.Parameter(torch.zeros(5000))
    param.grad = torch.ones(5000)
    optimizer = PagedAdamW([param], page_elements=64, host_budget_bytes=512, folder=tmp_path)
    optimizer.step()

    def full(file: int, begin: int, count: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            optimizer.state_dict()
    assert optimizer.state_dict()["state"][0]["exp_avg"].count_nonzero() == 5000


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"The folder '.*file/pages' cannot take .*: Not a directory; give another"):
        PagedAdamW(
            [nn.Parameter(torch.zeros(5000))],
            page_elements=64,
            host_budget_bytes=512,
            folder=tmp_path / "file" / "pages",
        )


def test_a_disk_that_fails_later_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(5000))
    param.grad = torch.ones(5000)
    optimizer = PagedAdamW([param], page_elements=64, host_budget_bytes=512, folder=tmp_path)
    monkeypatch.setattr(os, "pwritev", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(InputError, match=r"cannot be moved to or from disk: Input/output error\."):
        optimizer.step()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the resident size")
def test_a_state_ten_times_the_budget_keeps_to_it(tmp_path: Path) -> None:
    """128 MB of states in a budget of 12.8: the process grows by the budget, and by what a thread's stack takes."""
    script = textwrap.dedent("""
        import sys, torch
        from pathlib import Path
        from fourbit.optim import PagedAdamW

        def resident(name):
            line = next(line for line in Path("/proc/self/status").open() if line.startswith(name))
            return int(line.split()[1]) * 1024

        def step(param, optimizer, times):
            for _ in range(times):
                optimizer.step()

        torch.set_num_threads(1)
        param = torch.nn.Parameter(torch.ones(16_000_000))
        param.grad = torch.ones_like(param)
        small = torch.nn.Parameter(torch.ones(64))
        small.grad = torch.ones_like(small)
        step(small, PagedAdamW([small], page_elements=64), 1)  # what torch loads on first use is not ours
        optimizer = PagedAdamW([param], host_budget_bytes=12_800_000, folder=sys.argv[1])
        before = resident("VmRSS:")
        step(param, optimizer, 3)
        twin = torch.ones(1, requires_grad=True)
        twin.grad = torch.ones(1)
        step(twin, torch.optim.AdamW([twin], fused=True), 3)
        print(optimizer.size_bytes, resident("VmHWM:") - before, bool((param == twin).all()))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    state, grown, right = done.stdout.split()
    assert (int(state), right) == (128_000_000, "True")
    assert 10_000_000 < int(grown) < 12_800_000 + 4_000_000
