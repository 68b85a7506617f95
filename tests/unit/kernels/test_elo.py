"""The contract of Elo tournaments, on every backend and level: the same bits, and what chess players would compute."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fourbit.kernels import dispatch, ops


def packed(first: list[int], second: list[int], points: list[float]) -> Tensor:
    return torch.tensor(
        [a | b << 15 | int(2 * p) << 30 for a, b, p in zip(first, second, points, strict=True)], dtype=torch.int64
    )


def drawn(count: int, players: int, seed: int = 0) -> Tensor:
    generator = np.random.default_rng(seed)
    first = generator.integers(players, size=count)
    second = (first + generator.integers(1, players, size=count)) % players
    return packed(first.tolist(), second.tolist(), (generator.integers(3, size=count) / 2).tolist())


@pytest.mark.parametrize(
    ("counts", "players", "orders", "length"),
    [([1], 2, 1, 9), ([40, 0, 7], 5, 11, 50), ([100], 3, 8, 30), ([65], 32768, 3, 65), ([300, 300], 20, 17, 300)],
)
def test_every_backend_gives_the_bits_of_the_reference(
    backend: str, counts: list[int], players: int, orders: int, length: int
) -> None:
    matches = drawn(sum(counts), players)
    ends = torch.tensor(counts).cumsum(0)
    given = {"players": players, "orders": orders, "length": length, "seed": -3, "k": 24.0, "start": 1500.0}
    found = ops.elo(matches, ends, **given)
    with dispatch.use("reference"):
        expected = ops.elo(matches, ends, **given)
    assert found.shape == (len(counts), orders, players)
    assert torch.equal(found, expected)


def test_far_apart_ratings_do_not_overflow(backend: str) -> None:
    """A million to nothing: the expectation is 0 or 1 and not NaN."""
    matches = packed([0, 1], [1, 0], [1.0, 1.0])
    found = ops.elo(matches.repeat(50), torch.tensor([100]), players=2, orders=8, length=100, seed=0, k=1e6)
    assert bool(found.isfinite().all())
    with dispatch.use("reference"):
        again = ops.elo(matches.repeat(50), torch.tensor([100]), players=2, orders=8, length=100, seed=0, k=1e6)
    assert torch.equal(found, again)


@pytest.mark.parametrize("points", [0.0, 0.5, 1.0])
def test_one_match_is_the_formula(choice: str, points: float) -> None:
    """Two matches in a row between players of known ratings; the polynomial is off by less than 1e-13 of 32 points."""
    with dispatch.use(choice):
        found = ops.elo(
            packed([0, 0], [1, 1], [points, points]), torch.tensor([2]), players=2, orders=1, length=2, seed=0
        )
    one, other = 1000.0, 1000.0
    for _ in range(2):
        change = 32 * (points - 1 / (1 + math.pow(10, (other - one) / 400)))
        one, other = one + change, other - change
    assert found.flatten().tolist() == pytest.approx([one, other], abs=1e-10)


def test_orders_can_be_shared_out_among_calls(choice: str) -> None:
    matches, ends = drawn(90, 4), torch.tensor([90])
    with dispatch.use(choice):
        whole = ops.elo(matches, ends, players=4, orders=21, length=60, seed=7)
        parts = [
            ops.elo(matches, ends, players=4, orders=count, first_order=first, length=60, seed=7)
            for first, count in ((0, 5), (5, 16))
        ]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert len({tuple(row) for row in whole[0].tolist()}) == 21


def test_every_order_is_as_likely() -> None:
    """The first match is each of six equally often: chi-squared with 5 degrees is above 25.7 once in 10^4."""
    matches = packed([0] * 6, [1, 2, 3, 4, 5, 6], [1.0] * 6)
    found = ops.elo(matches, torch.tensor([6]), players=7, orders=6000, length=1, seed=1)[0, :, 1:]
    times = (found < 1000).sum(dim=0).double()
    assert times.sum() == 6000
    assert float(((times - 1000) ** 2 / 1000).sum()) < 25.7


def test_points_are_kept(choice: str) -> None:
    """What one wins the other loses: the sum stays, within a rounding of 2^-43 (of 1024) per match and player."""
    with dispatch.use(choice):
        found = ops.elo(drawn(200, 6), torch.tensor([200]), players=6, orders=9, length=200, seed=2)
    assert float((found.sum(dim=2) - 6000).abs().max()) <= 200 * 2 * 2**-42


def test_what_no_backend_takes() -> None:
    matches, ends = drawn(4, 3), torch.tensor([4])
    with pytest.raises(ValueError, match="players"):
        ops.elo(matches.to("meta"), ends.to("meta"), players=32769, orders=1, length=1, seed=0)
    with dispatch.use("native"), pytest.raises(RuntimeError, match="bad argument"):
        ops.elo(matches, ends, players=1, orders=1, length=1, seed=0)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fourbit.elo, (drawn(9, 3), torch.tensor([4, 9]), 3, 5, 0, 9, 1, 32.0, 1000.0))
