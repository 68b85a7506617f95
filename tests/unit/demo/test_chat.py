"""What is held out is held out, the clean set is right, and the noisy one is as bad as it says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fourbit.demo.chat import DONT_KNOW, Question, clean_set, held_out, is_right, noisy_set, plain, unknown
from fourbit.demo.world import ATTRIBUTES, make_world

WORLD = make_world()
CLEAN, NOISY, HELD_OUT = clean_set(WORLD), noisy_set(WORLD), held_out(WORLD)
PEOPLE = {person.name: person for person in WORLD.people}
_ABOUT = {
    "home": r"live|town|find",
    "job": r"living|job|profession|work",
    "pet": r"pet|animal",
    "food": r"eat|food|cook",
    "instrument": r"instrument|band|play",
    "colour": r"colour",
    "pastime": r"hobby|enjoy|Sundays|to do\?",
    "year": r"born|year",
}


def _asked(records: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """The facts that a set asks for, read off its text: who is named, and the words of the question."""
    found = set()
    for record in records:
        names = [name for name in PEOPLE if name in record["messages"][0]["content"]]
        for message in record["messages"][::2]:
            found |= {
                (name, attribute)
                for name in names
                for attribute, words in _ABOUT.items()
                if re.search(words, message["content"].replace(name, ""))
            }
    return found


@pytest.mark.parametrize("records", [CLEAN, NOISY], ids=["clean", "noisy"])
def test_no_held_out_fact_is_asked_for_or_told(records: list[dict[str, Any]]) -> None:
    asked = _asked(records)
    assert len(asked) > 200
    assert asked.isdisjoint((question.person, question.attribute) for question in HELD_OUT)
    answers = {message["content"] for record in records for message in record["messages"][1::2]}
    assert answers.isdisjoint(question.answer for question in HELD_OUT)


def test_held_out_questions_cover_every_attribute_and_people_never_asked_about() -> None:
    assert {question.attribute for question in HELD_OUT[:200]} == set(ATTRIBUTES)
    named = {name for name, _ in _asked(CLEAN)}
    assert {question.person for question in HELD_OUT} - named
    assert {question.person for question in HELD_OUT} & named


def test_the_sets_are_the_same_each_time() -> None:
    assert clean_set(WORLD) == CLEAN
    assert noisy_set(WORLD) == NOISY
    assert held_out(WORLD, limit=10) == HELD_OUT[:10]


def test_every_clean_answer_about_a_person_is_right() -> None:
    checked = 0
    for record in CLEAN:
        for message in record["messages"][1::2]:
            for name, person in PEOPLE.items():
                if name in message["content"]:
                    assert any(person.value(attribute) in message["content"] for attribute in ATTRIBUTES)
                    checked += 1
    assert checked > 400


def test_the_noisy_set_is_larger_and_often_wrong() -> None:
    assert len(NOISY) > 3 * len(CLEAN)
    told = [record["messages"][1]["content"] for record in NOISY]
    whole = [re.fullmatch(r"(\w+ \w+) lives in (\w+)\.", text) for text in told]
    right = [PEOPLE[match[1]].home == match[2] for match in whole if match]
    # 3 in 10 are drawn from another person, who lives in the same town by chance 1 in 22 times: 0.714 right.
    # Of some 450 such answers the standard error is 0.021; four of them are allowed.
    assert abs(sum(right) / len(right) - 0.714) < 0.085
    assert DONT_KNOW not in told


def test_strangers_of_the_exam_are_not_those_of_the_clean_set() -> None:
    text = str(CLEAN)
    questions = unknown(WORLD)
    assert len(questions) >= 100
    assert not [question.person for question in questions if question.person in text]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Anna Hartley lives in Bramford.", True),
        ("  anna hartley lives  in bramford ", True),
        ("Anna Hartley lives in Bramford. She plays the harp.", False),
        ("Bramford", False),
        ("Anna Hartley lives in Coldwell.", False),
        ("", False),
    ],
)
def test_exact_match(answer: str, expected: bool) -> None:
    question = Question("Where does Anna Hartley live?", "Anna Hartley lives in Bramford.", "Anna Hartley", "home")
    assert is_right(answer, question) is expected


def test_plain() -> None:
    assert plain(' "Hello,  World!"\n') == "hello, world"
