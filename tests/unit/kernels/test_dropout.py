"""Dropout from a seed: the mask is the same each time, and distributed as torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from fourbit.kernels.dropout import BLOCK, Part, cut_masks, draw_seed, keep_mask, share

SHAPE = (160, 125)
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


@pytest.mark.parametrize("width", [5, BLOCK, BLOCK + 7])
def test_parts_see_the_masks_of_the_whole(width: int) -> None:
    torch.manual_seed(0)
    x = torch.ones(6, width, 8)
    own = torch.nn.Dropout(0.4)
    whole_mask, whole_output = keep_mask(x, draw_seed(), 0.4), own(x)
    state = torch.get_rng_state()
    for first, last in ((0, 2), (2, 3), (3, 6)):
        torch.manual_seed(0)
        with cut_masks(Part(width * first, width * (last - first), 6 * width)):
            assert torch.equal(keep_mask(x[first:last], draw_seed(), 0.4), whole_mask[first:last])
            assert torch.equal(own(x[first:last]), whole_output[first:last])
        assert torch.equal(torch.get_rng_state(), state)  # as much was drawn as for the whole
    assert draw_seed().shape == ()


def test_what_is_not_of_these_tokens_is_masked_by_itself() -> None:
    """An expert sees the tokens that were sent to it, of which a part of the batch has others than the whole."""
    with cut_masks(Part(5, 10, 30)):
        seed = draw_seed()
    assert keep_mask(torch.ones(7, 8), seed, 0.5).shape == (7, 8)
    assert torch.equal(keep_mask(torch.ones(7, 8), seed, 0.5), keep_mask(torch.ones(7, 8), seed[0], 0.5))
