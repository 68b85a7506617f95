"""Work on memory that is in no cache, as a model's weights are when their turn comes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from fourbit.bench.environment import last_level_cache_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["copies_beyond_cache", "in_turn", "weight"]

T = TypeVar("T")
MOST_COPIES = 32


def copies_beyond_cache(size_bytes: int) -> int:
    """How many buffers of a size are together at least four times the last-level cache; a few for tiny ones."""
    return min(MOST_COPIES, 4 * last_level_cache_bytes() // max(size_bytes, 1) + 1)


def in_turn(items: Sequence[T], work: Callable[[T], object]) -> Callable[[], object]:
    """A call that does the work on the next item each time."""
    endless = itertools.cycle(items)
    return lambda: work(next(endless))


def weight(side: int) -> Tensor:
    """[side, side] bf16, the same in every process."""
    import torch

    return torch.randn(side, side, generator=torch.Generator().manual_seed(0)).bfloat16()
