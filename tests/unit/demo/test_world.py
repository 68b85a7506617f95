"""The world is the same each time, and nobody in it is two people."""

from __future__ import annotations

import pytest

from fourbit.demo.world import ATTRIBUTES, make_world, with_article


def test_a_seed_gives_one_world() -> None:
    assert make_world(3) == make_world(3)
    assert make_world(3) != make_world(4)


def test_names_are_unique_and_strangers_are_nobody() -> None:
    world = make_world()
    names = {person.name for person in world.people}
    assert len(names) == len(world.people) == 200
    assert len(set(world.strangers)) == len(world.strangers)
    assert names.isdisjoint(world.strangers)


def test_a_smaller_world_has_the_first_people_of_a_larger_one() -> None:
    small, large = make_world(people=20), make_world(people=50)
    assert [person.name for person in small.people] == [person.name for person in large.people[:20]]


def test_every_attribute_has_a_value_and_many_of_them() -> None:
    people = make_world().people
    for attribute in ATTRIBUTES:
        values = [person.value(attribute) for person in people]
        assert all(values)
        assert len(set(values)) >= 11
        # Else the commonest value would be right too often when it is guessed.
        assert max(values.count(value) for value in values) < 0.16 * len(people)


@pytest.mark.parametrize(("noun", "expected"), [("owl", "an owl"), ("cat", "a cat"), ("anvil", "an anvil")])
def test_article(noun: str, expected: str) -> None:
    assert with_article(noun) == expected
