"""What counts as a lack of memory, and that batches are halved until they fit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch

from fourbit.errors import InputError
from fourbit.kernels.native import library
from fourbit.models.out_of_memory import Halving, MemoryLimitReached, free_memory, is_out_of_memory, run_in_pieces


def test_the_allocator_of_the_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        MemoryLimitReached("the process holds too much"),
    ],
)
def test_a_lack_of_memory_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    offloading = InputError("no more pinned memory")
    offloading.__cause__ = error
    assert is_out_of_memory(offloading)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA out of memory"),
        None,
    ],
)
def test_other_errors_are_not(error: Exception | None) -> None:
    assert not is_out_of_memory(error)


def test_a_kernel_without_memory_raises_as_python_does() -> None:
    with pytest.raises(MemoryError, match="fb_linear"):
        library.check(library.NO_MEMORY, "fb_linear")


def test_batches_are_halved_and_stay_so(caplog: pytest.LogCaptureFixture) -> None:
    done: list[list[int]] = []

    def work(items: Sequence[int]) -> int:
        if len(items) > 3:
            raise torch.OutOfMemoryError("too many")
        done.append(list(items))
        return sum(items)

    smaller = Halving("numbers", hint="take fewer")
    found = [result for batch in ([*range(10)], [10, 11, 12, 13]) for _, result in smaller.run(batch, work)]
    assert done == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9], [10, 11, 12], [13]]
    assert found == [sum(items) for items in done]
    assert caplog.messages == ["out of memory: numbers are taken 3 at a time from here on."]


def test_one_item_that_does_not_fit_is_the_users_to_change() -> None:
    def work(items: Sequence[int]) -> int:
        raise torch.OutOfMemoryError("too many")

    with pytest.raises(
        InputError, match=r"One of the numbers alone does not fit into memory \(too many\); take fewer\."
    ):
        list(Halving("numbers", hint="take fewer").run([1, 2], work))


def test_nothing_of_a_failed_attempt_is_left_when_a_smaller_one_is_asked_for() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(size: int) -> int:
        tensor = torch.ones(size)
        held.append(weakref.ref(tensor))
        if size > 1:
            raise torch.OutOfMemoryError("too many")
        return size

    def make_smaller(size: int, reason: str) -> list[int]:
        assert reason == "too many"
        assert held[-1]() is None
        return [size // 2]

    assert list(run_in_pieces(4, work, cut=lambda size: [size], make_smaller=make_smaller)) == [(1, 1)]
    gc.collect()


def test_freed_memory_goes_back_to_the_system() -> None:
    """In a process that keeps it, as training does."""
    import subprocess
    import sys

    script = (
        "import torch\n"
        "from fourbit.kernels.native import library\n"
        "from fourbit.models.out_of_memory import free_memory\n"
        "resident_bytes = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "library.keep_freed_memory()\n"
        "parts = [torch.ones(1 << 20) for _ in range(50)]\n"
        "held = resident_bytes()\n"
        "del parts\n"
        "kept = resident_bytes()\n"
        "free_memory()\n"
        "print(held - kept, held - resident_bytes())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, freed = map(int, done.stdout.split())
    if kept > 50 << 20:
        pytest.skip("this C library gives memory back by itself")
    assert freed > 0.9 * 50 * (4 << 20)


def test_workspaces_are_made_anew_after_they_were_released() -> None:
    if isinstance(library.load(), str):
        pytest.skip("no native kernels")
    kept = library.workspaces()
    kept.bytes = torch.ones(3)
    free_memory()
    assert not hasattr(kept, "bytes")
