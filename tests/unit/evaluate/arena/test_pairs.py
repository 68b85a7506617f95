"""What is compared, and in which turn."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fourbit.evaluate.arena.pairs import PairSet, in_turn, plan_pairs


@pytest.mark.parametrize(("systems", "prompts"), [("ab", 10), ("abcd", 10), ("abcde", 3)])
def test_whoever_stops_early_has_seen_everything_about_as_often(
    pair_set: Callable[..., PairSet], systems: str, prompts: int
) -> None:
    pairs = pair_set(systems, prompts).pairs
    turns = in_turn(pairs, chance=random.Random(0))
    assert sorted(turns, key=str) == sorted(pairs, key=str)
    assert turns != in_turn(pairs, chance=random.Random(1))
    twos = {pair.systems for pair in pairs}
    for end in range(1, len(turns) + 1):
        by_systems = Counter(pair.systems for pair in turns[:end])
        assert max(by_systems[two] for two in twos) - min(by_systems[two] for two in twos) <= 1
        # each two systems have gone once around the circle of prompts before any of theirs comes again
        by_prompt = Counter(pair.prompt for pair in turns[:end])
        counts = [by_prompt[prompt] for prompt in range(prompts)]
        assert max(counts) - min(counts) <= len(twos)


def test_the_order_of_the_files_is_nothing_new(pair_set: Callable[..., PairSet]) -> None:
    given = pair_set("abc")
    turned = PairSet(
        given.systems[::-1],
        tuple(replace(pair, systems=pair.systems[::-1], answers=pair.answers[::-1]) for pair in given.pairs[::-1]),
    )
    assert turned.fingerprint == given.fingerprint
    other = (replace(given.pairs[0], answers=("x", given.pairs[0].answers[1])), *given.pairs[1:])
    assert PairSet(given.systems, other).fingerprint != given.fingerprint
    assert replace(given, live=True).fingerprint != given.fingerprint


def test_files_become_pairs(tmp_path: Path) -> None:
    for name, ids in (("a", (1, 2, 3)), ("b", (2, 3)), ("c", (3, 2))):
        records = [
            {"id": n, "prompt": f"q{n}", "text": "same" if n == 2 and name != "c" else f"{name}{n}"} for n in ids
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [str(tmp_path / f"{name}.jsonl") for name in "abc"]
    found = plan_pairs(files, common=True)
    assert (found.systems, found.prompts, len(found.pairs)) == (("a", "b", "c"), 2, 6)
    assert {pair.answers for pair in found.pairs if pair.systems == ("a", "c")} == {("same", "c2"), ("a3", "c3")}
    assert [sentence.split()[0] for sentence in found.sentences] == ["1", "1"]
    assert {pair.systems for pair in plan_pairs(files, common=True, reference="b").pairs} == {("a", "b"), ("c", "b")}


def test_half_a_letter_is_replaced(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"id": 1, "prompt": "q", "text": "x\\ud83d"}\n')
    (pair,) = plan_pairs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]).pairs
    assert pair.answers == ("x?", "x?")
