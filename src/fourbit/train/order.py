"""In which order a run takes its examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

__all__ = ["EpochSampler"]


class EpochSampler(Sampler[int]):
    """An order of the examples that depends on the seed and the epoch alone.

    Args:
        lengths: of the examples, in tokens.
        group_size: examples of about the same length come together in groups of this size; None to mix them all.
        seed: of the permutations.
    """

    def __init__(self, lengths: list[int], *, group_size: int | None, seed: int) -> None:
        self.lengths = lengths
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the permutation of this epoch; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.group_size is None:
            return iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group_size, generator=generator))
