"""Votes on answers that nobody wrote."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fourbit.evaluate.arena.pairs import Pair, PairSet
from fourbit.evaluate.arena.store import Store


@pytest.fixture
def pair_set() -> Callable[..., PairSet]:
    """Makes one: the systems, and so many prompts."""

    def make(systems: str = "ab", prompts: int = 6) -> PairSet:
        pairs = [
            Pair(number, f"What is {number}?", two, (f"{two[0]} says {number}", f"{two[1]} says {number}"))
            for number in range(prompts)
            for two in itertools.combinations(systems, 2)
        ]
        return PairSet(tuple(systems), tuple(pairs))

    return make


@pytest.fixture
def arena(tmp_path: Path, pair_set: Callable[..., PairSet]) -> Iterator[Callable[..., Store]]:
    """Makes a store of such a set with raters; its clock goes a second at every look."""
    made = []

    def make(raters: str = "anna ben", systems: str = "ab", prompts: int = 6) -> Store:
        ticks = itertools.count(1000.0)
        chance = random.Random(7)
        store = Store(
            tmp_path / "votes.sqlite",
            make=True,
            clock=lambda: next(ticks),
            draw_order=lambda: chance.random() < 0.5,
        )
        made.append(store)
        store.settle(pair_set(systems, prompts), chance=random.Random(3))
        store.add_raters(raters.split())
        return store

    yield make
    for store in made:
        store.close()
