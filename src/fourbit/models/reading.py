"""Reads tensors of a checkpoint one at a time, into memory that is used again.

Two costs are avoided. Mapping the file, as safetensors does, leaves every page that was looked at resident. Fresh
memory for each tensor costs a page fault per 4 KiB, which is many times slower than reading a cached file. So a tensor
is read into a block that goes back to a pool once nobody looks at it: quantizing a layer frees its block for the next,
and a tensor that the model keeps simply keeps its block.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict, deque
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourbit.errors import BrokenCheckpoint
from fourbit.models.checkpoint import DTYPE_NAMES, Checkpoint, Entry

__all__ = ["Reader", "StoredTensor"]

_POOLED_BYTES = 1 << 20
"""Smaller tensors go to the allocator, which reuses its small blocks by itself."""

_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}


class Reader:
    """Gives the tensors of a checkpoint; use it in a `with` block, which ends the reuse of memory.

    Tensors that are still alive after the block stay valid.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._pool = _Pool()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()

    def read(self, entry: Entry) -> Tensor:
        """A tensor, in the dtype it is stored in, in memory of its own. May be called from several threads.

        Raises:
            BrokenCheckpoint: the file has become shorter since its header was read.
        """
        data = self._pool.take(entry.nbytes)
        view = data.numpy().data
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            done = 0
            while done < entry.nbytes:  # one call reads 2 GiB at most
                count = file.readinto(view[done:])
                if not count:
                    raise BrokenCheckpoint(f"{entry.path} ended while the tensor {entry.name} was read.")
                done += count
        return data.view(entry.dtype).view(entry.shape)

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor, unread, as transformers takes a state dict."""
        return {name: StoredTensor(self, entry) for name, entry in self.checkpoint.entries.items()}

    def outlines(self) -> dict[str, StoredTensor]:
        """The same, but for tensors on the meta device: nothing is ever read."""
        return {name: _Outline(self, entry) for name, entry in self.checkpoint.entries.items()}


class StoredTensor:
    """A tensor that is read when it is indexed, like safetensors' slices, whose interface transformers expects."""

    def __init__(self, reader: Reader, entry: Entry) -> None:
        self.reader, self.entry = reader, entry

    def __getitem__(self, index: Any) -> Tensor:
        return self.reader.read(self.entry)[index]

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return _NAMES[self.entry.dtype]

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.entry.shape)


class _Outline(StoredTensor):
    """A tensor of which only the shape and the dtype are known."""

    def __getitem__(self, index: Any) -> Tensor:
        return torch.empty(self.entry.shape, dtype=self.entry.dtype, device="meta")[index]


class _Pool:
    """Blocks of memory by exact size. A block returns when the last tensor that looks at it is gone.

    A layer's tensors come in few sizes, so exact sizes reuse nearly every block and waste nothing where a tensor stays
    for good. The idle blocks are held to twice the largest one, the oldest going first.
    """

    def __init__(self) -> None:
        self._idle: OrderedDict[int, mmap.mmap] = OrderedDict()  # by id, oldest first
        self._returned: deque[mmap.mmap] = deque()
        self._largest, self._lock, self._open = 0, threading.Lock(), True

    def take(self, size: int) -> Tensor:
        """[size] uint8, not initialised."""
        if size < _POOLED_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        block = self._reuse(size) or _anonymous(size)
        array = np.frombuffer(block, dtype=np.uint8)
        weakref.finalize(array, _give_back, weakref.ref(self), block).atexit = False
        return torch.from_numpy(array)

    def close(self) -> None:
        """Free the idle blocks, and from now on each one that comes back."""
        with self._lock:
            self._open = False
            self._idle.clear()
            self._returned.clear()

    def put(self, block: mmap.mmap) -> None:
        """Take a block back.

        A garbage collection may call this at any moment, from within the methods here as well, so it takes no lock.
        """
        if self._open:
            self._returned.append(block)

    def _sort_in(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._idle[id(block)] = block
            self._largest = max(self._largest, len(block))
            while sum(map(len, self._idle.values())) > 2 * self._largest:
                self._idle.popitem(last=False)

    def _reuse(self, size: int) -> mmap.mmap | None:
        with self._lock:
            self._sort_in()
            key = next((key for key, block in self._idle.items() if len(block) == size), None)
            return None if key is None else self._idle.pop(key)


def _give_back(pool: weakref.ref[_Pool], block: mmap.mmap) -> None:
    alive = pool()
    if alive is not None:
        alive.put(block)


def _anonymous(size: int) -> mmap.mmap:
    """Memory straight from the operating system, and back to it when it is freed.

    In ordinary pages: huge ones are quicker to fill where they lie at hand, and several times slower where a virtual
    machine must first get them from its host.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
