"""A dropout mask that is made anew from a number in place of being kept between the passes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_mask", "share"]


def draw_seed() -> Tensor:
    """[] int64 on the CPU, from torch's own random numbers: seeds, checkpoints and torch.compile replay it."""
    return torch.randint(2**63 - 1, (), device="cpu")


def keep_mask(x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Which elements dropout leaves: each with the probability 1 - dropout, independently.

    Args:
        x: any shape; says the shape and the device.
        seed: [] int64 on the CPU; the same gives the same mask on one type of device.
        dropout: the probability of dropping an element, 0 to 1.

    Returns:
        bool, shape of `x`.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(seed))
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout, generator=generator)


def share(scaling: float, seed: Tensor | None, dropout: float) -> float:
    """What a product of kept elements is multiplied by: the scaling, and what makes up for the dropped ones."""
    if seed is None:
        return scaling
    return scaling / (1 - dropout) if dropout < 1 else 0.0
