"""Which part of which parameter's state lies in which page.

The parameters are laid out one after the other and cut into pages. Two rules keep the numbers what they would be
without pages. A parameter begins, and is cut, at a multiple of 64 elements: torch's vectorised kernel takes up to 32
elements at a time and does the rest one by one, with other roundings, so a cut elsewhere would change last bits. And a
block of 8-bit states belongs to one parameter, so there everything is a multiple of 256.

A page is one stretch of bytes, its sections one after the other, e elements each:

    32 bits    exp_avg [e] fp32, exp_avg_sq [e] fp32
     8 bits    exp_avg [e] uint8, exp_avg_sq [e] uint8, exp_avg_absmax [e/256] fp32, exp_avg_sq_absmax [e/256] fp32
    masters    a further [e] fp32 behind either
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourbit.formats import STATE_BLOCK_SIZE

__all__ = ["ALIGNMENT", "Kind", "Page", "Segment", "lay_out"]

ALIGNMENT = 64
"""Elements; see the head of this file."""


@dataclass(frozen=True)
class Kind:
    """What a page holds of each element.

    Attributes:
        bits: 32 or 8, of each of the two moments.
        master: whether there is an fp32 copy of the parameter as well.
    """

    bits: int
    master: bool

    @property
    def unit(self) -> int:
        """Parameters begin and are cut at multiples of so many elements."""
        return ALIGNMENT if self.bits == 32 else STATE_BLOCK_SIZE

    @property
    def unit_bytes(self) -> int:
        """The bytes of so many elements."""
        moments = 8 * self.unit if self.bits == 32 else 2 * self.unit + 8
        return moments + (4 * self.unit if self.master else 0)

    def size_bytes(self, elements: int) -> int:
        """The bytes of a page of so many elements."""
        return -(-elements // self.unit) * self.unit_bytes

    def sections(self, memory: Tensor, elements: int) -> dict[str, Tensor]:
        """The parts of a page by name, as views of its [size_bytes] uint8."""
        blocks = elements // STATE_BLOCK_SIZE
        if self.bits == 32:
            parts = [("exp_avg", torch.float32, elements), ("exp_avg_sq", torch.float32, elements)]
        else:
            parts = [("exp_avg", torch.uint8, elements), ("exp_avg_sq", torch.uint8, elements)]
            parts += [("exp_avg_absmax", torch.float32, blocks), ("exp_avg_sq_absmax", torch.float32, blocks)]
        if self.master:
            parts.append(("master", torch.float32, elements))
        found, begin = {}, 0
        for name, dtype, count in parts:
            end = begin + count * dtype.itemsize
            found[name] = memory[begin:end].view(dtype)
            begin = end
        return found


@dataclass(frozen=True)
class Segment:
    """A stretch of a parameter: its elements [start, stop) lie in a page from `offset` on."""

    parameter: int
    start: int
    stop: int
    offset: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass
class Page:
    """A page: `elements` of one kind, a multiple of the kind's unit, and whose they are."""

    index: int
    kind: Kind
    elements: int = 0
    segments: list[Segment] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return self.kind.size_bytes(self.elements)


def lay_out(parameters: Iterable[tuple[int, int, Kind]], *, page_bytes: int) -> list[Page]:
    """Place parameters in pages.

    Args:
        parameters: (index, elements, kind) of each, in the order in which they are to lie.
        page_bytes: what a page takes at most; each kind's unit fits.

    Returns:
        the pages. Those of a kind are filled in turn; a page holds one kind.
    """
    pages: list[Page] = []
    filling: dict[Kind, Page] = {}
    for parameter, count, kind in parameters:
        capacity = page_bytes // kind.unit_bytes * kind.unit
        start = 0
        while start < count:
            page = filling.get(kind)
            if page is None or page.elements >= capacity:
                page = filling[kind] = Page(len(pages), kind)
                pages.append(page)
            stop = min(count, start + capacity - page.elements)
            page.segments.append(Segment(parameter, start, stop, page.elements))
            page.elements += -(-(stop - start) // kind.unit) * kind.unit
            start = stop
    return pages
