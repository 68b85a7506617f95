"""The states of parameters out of their pages, for a checkpoint, and back into pages."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import InputError
from fourbit.formats import STATE_BLOCK_SIZE, block_count
from fourbit.kernels.reference.adamw import decode_moment, encode_moment
from fourbit.optim.layout import Kind, Segment
from fourbit.optim.moving import open_reserved
from fourbit.optim.paging import PagedStates
from fourbit.optim.update import flat

__all__ = ["put_states", "take_states"]

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""The moments of AdamW, and whether they have a sign."""


class _Room:
    """Where tensors of a state are made: plain memory, or a mapped file, whose pages the system can take back."""

    def __init__(self, folder: str | os.PathLike[str] | None, size_bytes: int) -> None:
        self._map: mmap.mmap | None = None
        self._used = 0
        if folder is not None and size_bytes:
            with open_reserved(folder, size_bytes) as file:
                self._map = mmap.mmap(file.fileno(), size_bytes)

    def tensor(self, count: int, dtype: torch.dtype) -> Tensor:
        if self._map is None or count == 0:
            return torch.empty(count, dtype=dtype)
        begin, self._used = self._used, self._used + _padded(count * dtype.itemsize)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // 64) * 64


def _lengths(kind: Kind, count: int) -> dict[str, tuple[str, int, torch.dtype]]:
    """What a state dict holds of a parameter: key -> section of a page, elements, dtype."""
    found: dict[str, tuple[str, int, torch.dtype]] = {}
    for name in MOMENTS:
        if kind.bits == 32:
            found[name] = name, count, torch.float32
        else:
            found[f"{name}_codes"] = name, count, torch.uint8
            found[f"{name}_absmax"] = f"{name}_absmax", block_count(count, STATE_BLOCK_SIZE), torch.float32
    if kind.master:
        found["master"] = "master", count, torch.float32
    return found


def take_states(
    places: Sequence[PagedStates],
    params: Sequence[Tensor],
    steps: Sequence[int],
    unfilled: set[int],
    folder: str | os.PathLike[str] | None,
) -> dict[int, dict[str, Tensor]]:
    """Copies of the states of all parameters that have taken a step, on the CPU, by index.

    Args:
        unfilled: the parameters that have no fp32 copies yet.
        folder: for a mapped file to hold them; None for memory.

    Raises:
        OSError: the disk has no room for that file.
    """
    kinds = {index: kind for place in places for index, kind in place.kinds.items()}
    wanted = {index: _lengths(kind, params[index].numel()) for index, kind in kinds.items() if steps[index]}
    total = sum(_padded(n * dtype.itemsize) for parts in wanted.values() for _, n, dtype in parts.values())
    room = _Room(folder, total)
    found = {i: {key: room.tensor(n, dtype) for key, (_, n, dtype) in parts.items()} for i, parts in wanted.items()}
    for place in places:
        pages = [page for page in place.pages if any(segment.parameter in found for segment in page.segments)]
        with closing(place.visit(pages, changes=False)) as visited:
            for page, memory in visited:
                sections = page.kind.sections(memory, page.elements)
                for segment in page.segments:
                    for key, (section, _, _) in wanted.get(segment.parameter, {}).items():
                        ours, theirs = _spans(segment, key)
                        found[segment.parameter][key][theirs] = sections[section][ours]
    return {index: _entry(tensors, params[index], steps[index], index in unfilled) for index, tensors in found.items()}


def _entry(tensors: dict[str, Tensor], param: Tensor, step: int, unfilled: bool) -> dict[str, Tensor]:
    """As torch has it: the step, and moments of the shape and the strides of their parameter."""
    if unfilled:
        tensors.pop("master", None)
    shaped = {
        key: tensor if key.endswith(("_codes", "_absmax")) else tensor.as_strided(param.shape, param.stride())
        for key, tensor in tensors.items()
    }
    return {"step": torch.tensor(float(step)), **shaped}


def put_states(places: Sequence[PagedStates], params: Sequence[Tensor], entries: Mapping[int, dict[str, Any]]) -> None:
    """Fill the pages of some parameters with what `take_states` or torch's AdamW gave.

    Raises:
        InputError: an entry is of another parameter.
    """
    for index, entry in entries.items():
        _check_entry(entry, params[index], index)
    for place in places:
        pages = [page for page in place.pages if any(segment.parameter in entries for segment in page.segments)]
        place.reserve()
        with closing(place.visit(pages, changes=True)) as visited:
            for page, memory in visited:
                sections = page.kind.sections(memory, page.elements)
                for segment in page.segments:
                    if segment.parameter in entries:
                        _put(segment, page.kind, sections, entries[segment.parameter], params[segment.parameter])


def _put(segment: Segment, kind: Kind, sections: dict[str, Tensor], entry: dict[str, Any], param: Tensor) -> None:
    """Fill a segment; a state of the other width is decoded or encoded."""
    for name, signed in MOMENTS.items():
        codes = entry.get(f"{name}_codes")
        keys = (f"{name}_codes", f"{name}_absmax")
        if kind.bits == 8 and codes is None:
            moment = _as_param(entry[name], param)[segment.start : segment.stop].float()
            parts = dict(zip(keys, encode_moment(moment, signed=signed), strict=True))
            source, start = parts, 0
        elif kind.bits == 32 and codes is not None:
            ours = {key: entry[key][_spans(segment, key)[1]] for key in keys}
            source, start = {name: decode_moment(ours[keys[0]], ours[keys[1]], signed=signed)}, 0
        else:
            source = {key: entry[key] for key in keys} if kind.bits == 8 else {name: _as_param(entry[name], param)}
            start = segment.start
        for key, tensor in source.items():
            ours_at, theirs_at = _spans(Segment(segment.parameter, start, start + segment.count, segment.offset), key)
            sections[key.removesuffix("_codes")][ours_at].copy_(tensor[theirs_at])
    if kind.master and "master" in entry:
        ours_at, theirs_at = _spans(segment, "master")
        sections["master"][ours_at].copy_(_as_param(entry["master"], param)[theirs_at])


def _as_param(moment: Tensor, param: Tensor) -> Tensor:
    """The elements of a moment in the order in which its parameter's lie."""
    if moment.stride() != param.stride():
        moment = torch.empty_strided(param.shape, param.stride(), dtype=moment.dtype).copy_(moment)
    return flat(moment)


def _spans(segment: Segment, key: str) -> tuple[slice, slice]:
    """Where a segment is in the section of its page, and where in the whole of its parameter."""
    if not key.endswith("_absmax"):
        return slice(segment.offset, segment.offset + segment.count), slice(segment.start, segment.stop)
    blocks = block_count(segment.count, STATE_BLOCK_SIZE)
    ours, theirs = segment.offset // STATE_BLOCK_SIZE, segment.start // STATE_BLOCK_SIZE
    return slice(ours, ours + blocks), slice(theirs, theirs + blocks)


def _check_entry(entry: Mapping[str, Any], param: Tensor, index: int) -> None:
    if "step" not in entry:
        raise InputError(f"The optimizer state of parameter {index} has no `step`; it is no state of an AdamW.")
    for name in MOMENTS:
        codes = entry.get(f"{name}_codes")
        if codes is None and name not in entry:
            raise InputError(f"The optimizer state of parameter {index} has no `{name}`; it is no state of an AdamW.")
        shape = list(entry[name].shape) if codes is None else [codes.numel()]
        wanted = list(param.shape) if codes is None else [param.numel()]
        if shape != wanted:
            raise InputError(
                f"The optimizer state of parameter {index} is {shape} for a parameter of {list(param.shape)}; it"
                " belongs to another model or adapter."
            )
