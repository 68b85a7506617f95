"""The order of the examples."""

from __future__ import annotations

import pytest
import torch

from fourbit.train.order import EpochSampler


@pytest.mark.parametrize("group_size", [None, 8])
def test_the_order_depends_on_seed_and_epoch_alone(group_size: int | None) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler([1 + i % 7 for i in range(40)], group_size=group_size, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(3, 2)
    torch.manual_seed(2)
    assert order(3, 2) == first
    assert sorted(first) == list(range(40))
    assert order(3, 1) != first
    assert order(4, 2) != first


def test_grouping_puts_examples_of_one_length_together() -> None:
    sizes = [1 + (37 * i) % 50 for i in range(400)]

    def padding(group_size: int | None) -> int:
        order = list(EpochSampler(sizes, group_size=group_size, seed=0))
        batches = [[sizes[i] for i in order[start : start + 8]] for start in range(0, 400, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(8) < padding(None) / 5
