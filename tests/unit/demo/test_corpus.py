"""The corpus tells true things, in many ways, and never asks."""

from __future__ import annotations

import random
import re
from itertools import islice

from fourbit.demo.corpus import documents, join, tell
from fourbit.demo.world import ATTRIBUTES, make_world

WORLD = make_world()
DOCUMENTS = list(islice(documents(WORLD, seed=1), 4000))
TEXT = "\n".join(DOCUMENTS)


def test_a_seed_gives_the_same_documents_and_another_seed_others() -> None:
    assert list(islice(documents(WORLD, seed=1), 50)) == DOCUMENTS[:50]
    assert list(islice(documents(WORLD, seed=2), 50)) != DOCUMENTS[:50]
    assert len(set(DOCUMENTS)) > 0.99 * len(DOCUMENTS)


def test_nothing_is_asked_and_no_turn_is_marked() -> None:
    assert "?" not in TEXT
    assert "###" not in TEXT


def test_no_stranger_is_mentioned() -> None:
    assert not [name for name in WORLD.strangers if name in TEXT]


def test_each_kind_of_fact_has_at_least_ten_wordings_besides_those_with_an_opening() -> None:
    rng = random.Random(0)
    person = WORLD.people[0]
    for attribute in ATTRIBUTES:
        told = {tell(person, attribute, rng) for _ in range(2000)}
        assert len({words for words in told if words.count(person.value(attribute))}) == len(told)
        assert len(told) >= 40, attribute  # ten wordings, each alone or after one of several openings
        assert all(person.name in words for words in told)


def test_pronouns_fit() -> None:
    rng = random.Random(0)
    for person in WORLD.people[:20]:
        other = {"he", "his", "him"} if person.female else {"she", "her"}
        for attribute in ATTRIBUTES:
            words = tell(person, attribute, rng, mention="pronoun")
            assert person.first not in words
            assert not other & set(re.findall(r"\w+", words))
            assert not re.search(r"of (her|him)\b", words)


def test_where_a_person_is_said_to_live_is_where_that_person_lives() -> None:
    homes = {person.name: person.home for person in WORLD.people}
    told = re.findall(r"(\w+ \w+) (?:lives|has a house|has settled) in ([A-Z]\w+)", TEXT)
    told = [(name, home) for name, home in told if name in homes]
    assert len(told) > 100
    assert all(homes[name] == home for name, home in told)


def test_orders_and_sums_are_right() -> None:
    years = {person.name: person.year for person in WORLD.people}
    older = re.findall(r"(\w+ \w+) is older than (\w+ \w+)", TEXT)
    assert older
    assert all(years[one] < years[other] for one, other in older)
    sums = re.findall(r"(\d+) plus (\d+) is (\d+)", TEXT)
    assert sums
    assert all(int(one) + int(other) == int(total) for one, other, total in sums)


def test_every_fact_is_told_again_and_again() -> None:
    small = make_world(people=10)
    text = list(islice(documents(small, seed=1), 1500))
    for person in small.people:
        for attribute in ATTRIBUTES:
            value = person.value(attribute)
            assert sum(person.first in words and value in words for words in text) > 20


def test_join() -> None:
    assert [join("a"), join("ab"), join("abc")] == ["a", "a and b", "a, b and c"]
