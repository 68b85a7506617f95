"""Writes a safetensors file tensor by tensor, in any order, holding none of them.

The header stands before the tensors and gives the place of each, but the JSON part of a quantized tensor has a length
that is known only once it is quantized. So room is kept for the longest header there can be, tensors of known size get
their places beforehand, and the others follow at the end; the format allows spaces behind a header.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourbit.models.checkpoint import DTYPE_NAMES

__all__ = ["Planned", "SafetensorsWriter"]

_NAMES = {dtype: name for name, dtype in DTYPE_NAMES.items()}
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Attributes:
        dtype, shape: of the tensor.
        exact: False where `shape` is only the most it can be; such a tensor is uint8 with one dimension.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    exact: bool = True

    @property
    def nbytes(self) -> int:
        """Its bytes, or the most they can be."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One file. `write` each planned tensor once, then `finish`.

    Args:
        path: of the new file.
        planned: what will be written, by name.
    """

    def __init__(self, path: Path, planned: Mapping[str, Planned]) -> None:
        self.path, self._planned = path, dict(planned)
        self._fields: dict[str, dict[str, Any]] = {}
        self._places: dict[str, int] = {}
        end = 0
        # widest dtype first, as the safetensors library has it, so that every tensor is aligned
        for name, tensor in sorted(planned.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
            if tensor.exact:
                self._places[name] = end
                end += tensor.nbytes
        self._end = end
        self._header_bytes = self._longest_header()
        self._file = path.open("xb", buffering=0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            ValueError: it was not planned like this, or was written before.
        """
        planned = self._planned.pop(name, None)
        shape = tuple(tensor.shape)
        if planned is None or planned.dtype != tensor.dtype or (planned.exact and planned.shape != shape):
            raise ValueError(f"The tensor {name}, {tensor.dtype} {list(shape)}, was not planned like this: {planned}.")
        if not planned.exact:
            if len(shape) != 1 or shape > planned.shape:
                raise ValueError(f"The tensor {name} has {list(shape)} bytes; {planned} was planned.")
            self._places[name] = self._end
            self._end += shape[0]
        place = self._places[name]
        flat = tensor.detach().cpu().contiguous().view(-1)
        self._write_at(_LENGTH_BYTES + self._header_bytes + place, flat.view(torch.uint8).numpy().data)
        self._fields[name] = _fields(tensor.dtype, shape, place)

    def finish(self) -> None:
        """Write the header and put everything safely on the disk.

        Raises:
            ValueError: a planned tensor was not written.
        """
        if self._planned:
            raise ValueError(
                f"{len(self._planned)} planned tensors were not written, such as {next(iter(self._planned))}."
            )
        header = _header(self._fields).ljust(self._header_bytes)
        self._write_at(0, memoryview(struct.pack("<Q", len(header)) + header))
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Stop without a header, which leaves no valid file."""
        self._file.close()

    def _write_at(self, place: int, data: memoryview) -> None:
        self._file.seek(place)
        while data:  # one call writes 2 GiB at most
            data = data[self._file.write(data) :]

    def _longest_header(self) -> int:
        total = sum(tensor.nbytes for tensor in self._planned.values())
        fields = {name: _fields(t.dtype, t.shape, self._places.get(name, total)) for name, t in self._planned.items()}
        return -(-len(_header(fields)) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


_LENGTH_BYTES = 8


def _fields(dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> dict[str, Any]:
    end = begin + math.prod(shape) * dtype.itemsize
    return {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}


def _header(fields: Mapping[str, dict[str, Any]]) -> bytes:
    ordered = sorted(fields.items(), key=lambda item: item[1]["data_offsets"])
    header = {"__metadata__": {"format": "pt"}, **dict(ordered)}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
