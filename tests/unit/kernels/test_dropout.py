"""Dropout from a seed: the mask is the same each time, and distributed as torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from fourbit.kernels.dropout import draw_seed, keep_mask, share

SHAPE = (40, 500)
N = math.prod(SHAPE)
DEVIATIONS = 5
"""How many standard deviations a count may be off; one in 1.7 million would be, and these are the same each time."""


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5, 0.9])
def test_each_element_is_kept_with_its_probability_and_by_itself(dropout: float) -> None:
    keep = keep_mask(torch.empty(SHAPE), torch.tensor(7), dropout).double()
    spread = math.sqrt(dropout * (1 - dropout))
    assert abs(keep.mean() - (1 - dropout)) <= DEVIATIONS * spread / math.sqrt(N)
    centred = (keep - (1 - dropout)) / spread
    for along in (0, 1):  # neighbours in a row and in a column say nothing of each other
        product = (centred * centred.roll(1, along)).mean()
        assert abs(product) <= DEVIATIONS / math.sqrt(N)
    other = keep_mask(torch.empty(SHAPE), torch.tensor(8), dropout).double()
    assert abs((centred * (other - (1 - dropout)) / spread).mean()) <= DEVIATIONS / math.sqrt(N)


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(0)
    first = keep_mask(torch.empty(SHAPE), torch.tensor(7), 0.3)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(keep_mask(torch.ones(SHAPE, dtype=torch.bfloat16), torch.tensor(7), 0.3), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # and nothing was drawn from torch's own


def test_seeds_follow_torchs_own() -> None:
    torch.manual_seed(0)
    first, second = draw_seed(), draw_seed()
    assert first.shape == ()
    assert first != second
    torch.manual_seed(0)
    assert draw_seed() == first


def test_nothing_and_everything_can_be_dropped() -> None:
    assert keep_mask(torch.empty(SHAPE), torch.tensor(7), 0.0).all()
    assert not keep_mask(torch.empty(SHAPE), torch.tensor(7), 1.0).any()
    assert share(2.0, torch.tensor(7), 1.0) == 0
    assert share(2.0, torch.tensor(7), 0.5) == 4
    assert share(2.0, None, 0.5) == 2
