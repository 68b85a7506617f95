"""Which texts are there twice, held against comparing every pair."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fourbit.data.duplicates import NEAR, SEQUENCE, find_duplicates
from fourbit.data.recognise import recognise
from fourbit.data.records import read_records

LONG = " ".join(f"word{number}" for number in range(100))


def sequences(text: str) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    length = min(SEQUENCE, len(words))
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)} if words else set()


def likeness(one: str, other: str) -> float:
    first, second = sequences(one), sequences(other)
    return len(first & second) / len(first | second)


def test_the_same_but_for_case_and_white_space() -> None:
    found = find_duplicates(["Hi there.", "hi\n THERE. ", "Hi there!", "", " ", "Hi there."])
    assert found.first == [0, 0, 2, 3, 3, 0]
    assert found.near == {}


def test_near_is_a_share_of_sequences_of_words() -> None:
    changed = LONG.replace("word50", "other")  # of 96 sequences 5 hold it: 91 / 101 are shared
    apart = LONG.replace("word20", "a").replace("word50", "b").replace("word80", "c")  # 81 / 111
    assert likeness(LONG, changed) > NEAR > likeness(LONG, apart)
    assert find_duplicates([LONG, changed, apart]).near == {1: [0]}
    assert find_duplicates(["What is 2 + 3 ? 5", "What is 2 + 4 ? 6"]).near == {}


def test_as_every_pair_compared() -> None:
    """Texts of which words are changed, at all degrees of likeness."""
    draw = random.Random(0)
    texts = []
    for _ in range(60):
        words = [f"w{draw.randrange(5000)}" for _ in range(draw.randrange(20, 120))]
        for changes in range(5):
            texts.append(" ".join(f"x{draw.random()}" if draw.random() < changes / 80 else word for word in words))
    found = find_duplicates(texts)
    expected = {
        (one, other)
        for one in range(len(texts))
        for other in range(one)
        if texts[one] != texts[other] and likeness(texts[one], texts[other]) >= NEAR
    }
    firsts = {(one, other) for one, other in expected if found.first[one] == one and found.first[other] == other}
    assert {(one, other) for one, others in found.near.items() for other in others} == firsts
    assert len(firsts) > 40


@given(texts=st.lists(st.text(st.sampled_from("ab \n"), max_size=12), max_size=12))
def test_any_texts(texts: list[str]) -> None:
    found = find_duplicates(texts)
    assert all(first <= number and found.first[first] == first for number, first in enumerate(found.first))
    for number, others in found.near.items():
        assert all(other < number and likeness(texts[number], texts[other]) >= NEAR for other in others)


def test_progress_and_real_data(shared_data: Path) -> None:
    """Of 999 real records 14 repeat an earlier one, by a count of their normalised texts."""
    told: list[int] = []
    examples = recognise(read_records(shared_data / "alpaca" / "alpaca_gpt4style_999.json")).examples
    texts = ["\n".join(turn["content"] for turn in example.messages or ()) for example in examples]
    found = find_duplicates(texts, progress=lambda done, of: told.append(done))
    assert sum(first != number for number, first in enumerate(found.first)) == 14
    assert len(texts) - len({" ".join(text.casefold().split()) for text in texts}) == 14
    assert told == [0, 500]
