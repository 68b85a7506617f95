"""What the safetensors files of a model folder hold, checked before a byte of a tensor is read.

A safetensors file is eight bytes of header length, a JSON header that gives each tensor's dtype, shape and place, and
the bytes of the tensors one after the other. We read it ourselves, because the library maps the whole file: every page
that was looked at counts as resident until the file is closed, so quantizing would hold the 16-bit model after all.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourbit.errors import BrokenCheckpoint, NotAModel

__all__ = ["DTYPE_NAMES", "INDEX_FILE", "WEIGHTS_FILE", "Checkpoint", "Entry", "read_header", "read_json"]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPE_NAMES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "U8": torch.uint8,
}
"""The dtypes of safetensors by the names that stand in its headers."""

_LENGTH_BYTES = 8
_LARGEST_HEADER_BYTES = 100_000_000  # what the safetensors library allows
_QUANT_STATE = ".quant_state."


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies.

    Attributes:
        name: its key.
        path: the file.
        dtype, shape: of the tensor.
        offset: of its first byte in the file.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def numel(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder.

    Attributes:
        folder: where it is.
        files: its safetensors files, in order.
        entries: every tensor by name.
    """

    folder: Path
    files: tuple[Path, ...]
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a model folder: `model.safetensors`, or the shards that its index names.

        Raises:
            NotAModel: there are no safetensors files.
            BrokenCheckpoint: a file is missing, truncated or corrupt, or lacks a tensor; named.
        """
        expected = _files(folder)
        entries: dict[str, Entry] = {}
        for path, names in expected.items():
            found = {entry.name: entry for entry in read_header(path)}
            for name in names:
                if name not in found:
                    raise BrokenCheckpoint(f"{path} lacks the tensor {name}, which {INDEX_FILE} places there.")
            if twice := entries.keys() & found.keys():
                raise BrokenCheckpoint(f"The tensor {min(twice)} is both in {entries[min(twice)].path} and in {path}.")
            entries |= found
        if not entries:
            raise BrokenCheckpoint(f"There is no tensor in {next(iter(expected))}.")
        return cls(folder, tuple(expected), _packed_as_bytes(entries))

    @property
    def quantized(self) -> set[str]:
        """The names of the weights that are in 4 bits already."""
        return {name.partition(_QUANT_STATE)[0] for name in self.entries if _QUANT_STATE in name}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def in_file(self, path: Path) -> list[Entry]:
        """The tensors of one file, in the order of their bytes."""
        return sorted((e for e in self.entries.values() if e.path == path), key=lambda entry: entry.offset)


def _packed_as_bytes(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """See 4-bit codes as the bytes they are: bitsandbytes can store them under another dtype (`quant_storage`)."""
    packed = {name.partition(_QUANT_STATE)[0] for name in entries if _QUANT_STATE in name}
    return {
        name: Entry(name, entry.path, torch.uint8, (entry.nbytes, 1), entry.offset) if name in packed else entry
        for name, entry in entries.items()
    }


def _files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a folder, with the tensors that an index places in them."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        return {single: []}
    if not index.is_file():
        raise NotAModel(_no_weights(folder))
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise BrokenCheckpoint(f"{index} has no weight_map that gives the file of each tensor.")
    files: dict[Path, list[str]] = {}
    for name, file in places.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BrokenCheckpoint(
                f"{index} places the tensor {name} in {file!r}; it must be a safetensors file beside."
            )
        files.setdefault(folder / file, []).append(name)
    for path in files:
        if not path.is_file():
            raise BrokenCheckpoint(f"The shard {path.name} is missing in {folder}; {INDEX_FILE} names it.")
    return dict(sorted(files.items()))


def _no_weights(folder: Path) -> str:
    shards = sorted(folder.glob("*-of-*.safetensors"))
    if shards:
        return f"{folder} holds shards such as {shards[0].name}, but no {INDEX_FILE} that says what is in them."
    pickles = sorted(path for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds its weights only as a pickle ({pickles[0].name}), which can run any code when it is read;"
            " convert them to safetensors first."
        )
    return f"{folder} holds no {WEIGHTS_FILE} and no {INDEX_FILE}, so there are no weights to read."


def read_header(path: Path) -> list[Entry]:
    """The tensors of one safetensors file, with everything that the header claims checked against the file's size.

    Raises:
        BrokenCheckpoint: what is wrong with it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if not start:
            raise BrokenCheckpoint(f"{path} is empty.")
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else size
        if length > _LARGEST_HEADER_BYTES:
            raise BrokenCheckpoint(f"{path} is no safetensors file: its header would have {length:,} bytes.")
        if _LENGTH_BYTES + length > size:
            raise BrokenCheckpoint(f"{path} is truncated: it has {size:,} bytes, and its header alone needs more.")
        header = _parse(path, file.read(length))
    entries = [_entry(path, name, fields, _LENGTH_BYTES + length) for name, fields in header.items()]
    end = _LENGTH_BYTES + length
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise BrokenCheckpoint(f"The header of {path} is corrupt: {entry.name} does not start where it must.")
        end += entry.nbytes
    if end > size:
        raise BrokenCheckpoint(f"{path} is truncated: its tensors need {end:,} bytes, and it has {size:,}.")
    if end < size:
        raise BrokenCheckpoint(f"{path} is corrupt: {size - end:,} bytes at its end belong to no tensor.")
    return entries


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(
            f"{path} is no safetensors file, or corrupt: its header is not JSON ({error})."
        ) from error
    if not isinstance(header, dict):
        raise BrokenCheckpoint(f"The header of {path} is corrupt: it is no table of tensors.")
    header.pop("__metadata__", None)
    return header


def _entry(path: Path, name: str, fields: Any, start: int) -> Entry:
    try:
        dtype_name, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as error:
        raise BrokenCheckpoint(f"The header of {path} is corrupt at the tensor {name}.") from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPE_NAMES:
        raise BrokenCheckpoint(
            f"The tensor {name} in {path} has the dtype {dtype_name!r}; known are {', '.join(sorted(DTYPE_NAMES))}."
        )
    if not whole:
        raise BrokenCheckpoint(
            f"The header of {path} is corrupt at the tensor {name}: a size is no whole number, or beyond all bounds."
        )
    entry = Entry(name, path, DTYPE_NAMES[dtype_name], shape, start + begin)
    if entry.nbytes != end - begin:
        raise BrokenCheckpoint(
            f"The tensor {name} in {path} has {end - begin:,} bytes; {dtype_name} {list(shape)} needs {entry.nbytes:,}."
        )
    return entry


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        BrokenCheckpoint: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise BrokenCheckpoint(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value
