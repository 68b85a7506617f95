"""Contract: Elo tournaments in random orders."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference

__all__ = ["MOST_PLAYERS", "elo"]

MOST_PLAYERS = 32768
"""A match is 32 bits: fifteen for each of its players, two for who won."""


def elo(
    matches: Tensor,
    ends: Tensor,
    *,
    players: int,
    orders: int,
    length: int,
    seed: int,
    first_order: int = 0,
    k: float = 32.0,
    start: float = 1000.0,
) -> Tensor:
    """Play tournaments, each in several random orders, and give the ratings that each order ends with.

    Everyone starts with `start`, and a match between a and b, of which a gets `points`, does

        d = k (points - 1 / (1 + 10^((r_b - r_a) / 400)));   r_a += d;   r_b -= d

    Args:
        matches: [M] int64, each a | b << 15 | (2 points) << 30 with players a != b and points 0, 1/2 or 1.
        ends: [T] int64, ascending: tournament t has the matches ends[t - 1] to ends[t] - 1.
        players: P, at most `MOST_PLAYERS`.
        orders: O, of each tournament.
        length: matches that an order plays, drawn without replacement; all where there are fewer.
        seed: what order o of tournament t draws depends on it, t and first_order + o alone.
        first_order: for calls that share the orders out.
        k, start: see above.

    Returns:
        [T, O, P] fp64. Every backend gives the same bits.

    Raises:
        ValueError: players, matches or ends that are not as above.
    """
    ratings: Tensor = torch.ops.fourbit.elo(
        matches, ends, players, orders, first_order, length, _signed(seed), float(k), float(start)
    )
    return ratings


def _signed(seed: int) -> int:
    """64 bits as torch's schema takes them."""
    return (seed + 2**63) % 2**64 - 2**63


def _fake(
    matches: Tensor,
    ends: Tensor,
    players: int,
    orders: int,
    first_order: int,
    length: int,
    seed: int,
    k: float,
    start: float,
) -> Tensor:
    if matches.dtype != torch.int64 or ends.dtype != torch.int64 or matches.dim() != 1 or ends.dim() != 1:
        raise ValueError("Matches and ends are vectors of int64.")
    if not 1 <= players <= MOST_PLAYERS or orders < 0 or length < 0 or first_order < 0:
        raise ValueError(f"There are 1 to {MOST_PLAYERS} players, and no negative numbers of orders or matches.")
    return matches.new_empty((ends.shape[0], orders, players), dtype=torch.float64)


dispatch.define(
    "elo(Tensor matches, Tensor ends, int players, int orders, int first_order, int length, int seed, float k,"
    " float start) -> Tensor",
    stem="elo",
    reference=reference.elo,
    fake=_fake,
)
