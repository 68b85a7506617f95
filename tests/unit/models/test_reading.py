"""Reading tensors into memory that is used again."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fourbit.errors import BrokenCheckpoint
from fourbit.models.checkpoint import Checkpoint
from fourbit.models.reading import Reader, _Pool

ROWS = 1024  # of 1024 bf16: 2 MiB, large enough to be pooled


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    many = {f"w{number}": torch.randn(ROWS, 1024, generator=generator).bfloat16() for number in range(8)}
    return many | {
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "small": torch.arange(7, dtype=torch.int32),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


def test_it_reads_what_was_written(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    with Reader(checkpoint) as reader:
        for name, expected in tensors.items():
            found = reader.read(checkpoint.entries[name])
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert torch.equal(found, expected)
            assert torch.equal(reader.tensors()[name][...], expected)
            assert reader.outlines()[name][...].is_meta


def test_memory_is_used_again_once_nobody_looks_at_it(checkpoint: Checkpoint) -> None:
    with Reader(checkpoint) as reader:
        places = set()
        for number in range(8):
            places.add(reader.read(checkpoint.entries[f"w{number}"]).data_ptr())
        assert len(places) == 1


def test_a_tensor_that_is_kept_is_not_written_over(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    with Reader(checkpoint) as reader:
        kept = {"w0": reader.read(checkpoint.entries["w0"]), "w3": reader.read(checkpoint.entries["w3"])[5:9]}
        for number in range(8):
            reader.read(checkpoint.entries[f"w{number}"])
        assert torch.equal(kept["w0"], tensors["w0"])
        assert torch.equal(kept["w3"], tensors["w3"][5:9])
    kept["w0"].add_(1)  # it is ordinary memory, also after the reader is gone
    assert torch.equal(kept["w0"], tensors["w0"] + 1)


def test_threads_do_not_meet_in_one_block(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    def check(number: int) -> bool:
        name = f"w{number % 8}"
        return torch.equal(reader.read(checkpoint.entries[name]), tensors[name])

    with Reader(checkpoint) as reader, ThreadPoolExecutor(4) as threads:
        assert all(threads.map(check, range(200)))


def test_a_file_that_shrinks_meanwhile(checkpoint: Checkpoint) -> None:
    path = checkpoint.files[0]
    path.write_bytes(path.read_bytes()[:1000])
    with Reader(checkpoint) as reader, pytest.raises(BrokenCheckpoint, match=r"ended while the tensor w7 was read"):
        reader.read(checkpoint.entries["w7"])


def test_a_block_can_come_back_while_another_is_looked_for() -> None:
    """A garbage collection inside the pool runs finalizers there: one that waited for the pool would wait for ever."""
    pool = _Pool()
    with pool._lock:
        pool.put(mmap.mmap(-1, 1 << 21))
    assert pool._reuse(1 << 21) is not None
    assert pool._reuse(1 << 21) is None
    pool.close()
    pool.put(mmap.mmap(-1, 1 << 21))
    assert pool._reuse(1 << 21) is None
