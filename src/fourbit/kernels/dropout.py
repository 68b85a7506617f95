"""A dropout mask that is made anew from a number in place of being kept between the passes.

A batch that did not fit into memory is done again in parts (`train.rescue`), and then each part has to see the mask
that it would have seen within the whole. So a seed can say which part of a batch it is for: the mask of the whole is
made, and the part cut out of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Part", "cut_masks", "draw_seed", "keep_mask", "share"]


BLOCK = 64
"""Tokens whose mask has a generator of its own on a CPU: a part of a batch takes the time and memory of a part."""


class Part(NamedTuple):
    """Which of the tokens of a batch, counted row by row, are computed: `tokens` of `whole`, from `first` on."""

    first: int
    tokens: int
    whole: int


_part: Part | None = None
"""Of the whole process, as the backward pass, where checkpointing draws again, may run on another thread."""


@contextmanager
def cut_masks(part: Part) -> Iterator[None]:
    """Within the block dropout takes its masks out of those of a whole batch, and draws as often as that would.

    So do the dropout modules of torch, whose input has the tokens in front: [B, T, ...].
    """
    global _part
    before, own = _part, functional.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or inplace or input.dim() < 3 or input.shape[0] * input.shape[1] != part.tokens:
            return own(input, p, training, inplace)
        ones = torch.ones((part.whole, *input.shape[2:]), dtype=input.dtype, device=input.device)
        keep = _cut(own(ones, p, training), part).view(input.shape) != 0
        return input * keep * (1 / (1 - p) if p < 1 else 0.0)

    _part, functional.dropout = part, dropout
    try:
        yield
    finally:
        _part, functional.dropout = before, own


def draw_seed() -> Tensor:
    """[] int64 on the CPU, from torch's own random numbers: seeds, checkpoints and torch.compile replay it.

    Within `cut_masks` [4]: the seed, and the part.
    """
    seed = torch.randint(2**63 - 1, (), device="cpu")
    return seed if _part is None else torch.stack([seed, *map(torch.tensor, _part)])


def keep_mask(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Which elements dropout leaves: each with the probability 1 - dropout, independently.

    Args:
        x: [..., K]; says the shape and the device.
        seed: from `draw_seed`; the same gives the same mask on one type of device. Where it says that `x` is a part of
            a batch, and `x` has as many tokens, the mask is that part of the whole batch's.
        dropout: the probability of dropping an element, 0 to 1.

    Returns:
        bool, shape of `x`.
    """
    number, *rest = seed.reshape(-1).tolist()
    features = x.shape[-1] if x.dim() else 1
    tokens = math.prod(x.shape[:-1])
    part = Part(*rest) if rest and rest[1] == tokens else Part(0, tokens, tokens)
    generator = torch.Generator(device=x.device)
    if x.device.type != "cpu":  # a launch for each block would take longer than the rest of the mask
        whole = torch.empty((part.whole, features), dtype=torch.bool, device=x.device)
        return _cut(whole.bernoulli_(1 - dropout, generator=generator.manual_seed(number)), part).view(x.shape)
    first, last = part.first // BLOCK * BLOCK, min(-(-(part.first + tokens) // BLOCK) * BLOCK, part.whole)
    keep = torch.empty((last - first, features), dtype=torch.bool)
    for start in range(first, last, BLOCK):
        keep[start - first :][:BLOCK].bernoulli_(1 - dropout, generator=generator.manual_seed(number + start))
    return keep[part.first - first :][:tokens].view(x.shape)


def _cut(whole: Tensor, part: Part) -> Tensor:
    return whole[part.first : part.first + part.tokens]


def share(scaling: float, seed: Tensor | None, dropout: float) -> float:
    """What a product of kept elements is multiplied by: the scaling, and what makes up for the dropped ones."""
    if seed is None:
        return scaling
    return scaling / (1 - dropout) if dropout < 1 else 0.0
