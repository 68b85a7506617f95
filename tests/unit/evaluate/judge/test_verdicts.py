"""Replies of every kind, and none that is guessed at."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from fourbit.evaluate.judge.verdicts import read_reply


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("Good.\nVerdict: 1", 1),
        ("**Verdict: 2**", 2),
        ("### Verdict: 3.\n\nI hope this helps!", 3),
        ("Verdict: tie", 3),
        ("Verdict: neither", 3),
        ("Verdict: Answer 2", 2),
        ("Verdict: [1]", 1),
        ("Verdict: 1 (clearly better)", 1),
        ("The verdict is 2.", 2),
        ("Verdict: 2\nOn second thoughts:\nVerdict: 1", 1),
        ("I say [[B]]", 2),
        ("[[C]]", 3),
        ('{"why": "it is right", "verdict": 1}', 1),
        ('{"verdict": "tie"}', 3),
        ("A long explanation.\n\n3", 3),
        ("1", 1),
        ("<think>Verdict: 2</think>Verdict: 1", 1),
        ("", -1),
        ("Both are good.", -1),
        ("Verdict: 1 or 2", -1),
        ("Verdict: 1/2", -1),
        ("Verdict: 12", -1),
        ("Verdict: 1.5", -1),
        ("Verdict: -1", -1),
        ("Verdict: 4", -1),
        ("Verdict: N", -1),
        ("Verdict: First, both are good", -1),
        ("Verdict: 1 is better than 2", -1),
        ("Verdict: 1\nVerdict: unclear", -1),
        ("<think>Verdict: 1", -1),
        ("3. is the number of mistakes in answer 1", -1),
        ("1 apple", -1),
    ],
)
def test_verdicts(reply: str, label: int) -> None:
    assert read_reply(reply, "verdict").label == label


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Scores: 8 7", (8.0, 7.0)),
        ("**Scores:** 8, 7.5", (8.0, 7.5)),
        ("Scores: 8/10 and 7/10.", (8.0, 7.0)),
        ("Score: 8 out of 10, 7 out of ten", (8.0, 7.0)),
        ("9 8.5\nBoth answers are good.", (9.0, 8.5)),
        ("Both answers are good.\n10 0", (10.0, 0.0)),
        ("First I solve it: 4.\n\n9 3\n\nAnswer 1 is right.", (9.0, 3.0)),
        ("4 4\nand so\n5 5\nand so on", (4.0, 4.0)),
        ("Scores:\nAssistant 1: 10 (right)\nAssistant 2: 2.5/10\nThe first is better.", (10.0, 2.5)),
        ("Scores: Answer 1: 9, Answer 2: 8.", (9.0, 8.0)),
        ("Answer 1: 50%\nAnswer 2: 8", None),
        ("Answer 1: 5 apples\nAnswer 2: 8", None),
        ("First\n4 4\n5 5\nand so on", None),
        ('{"scores": [3, 4]}', (3.0, 4.0)),
        ("Scores: 11 2", None),
        ("Scores: -8 7", None),
        ("Scores: 8", None),
        ("Answer 1 is bad. Score: 2/10\nAnswer 2 is good. Score: 10/10", None),
        ("Scores: 8 7 6", None),
        ("Scores: X Y", None),
        ("Scores: 8 1e9", None),
        ("", None),
    ],
)
def test_scores(reply: str, scores: tuple[float, float] | None) -> None:
    found = read_reply(reply, "scores")
    assert found.scores == scores
    assert found.label == (-1 if scores is None else 3 if scores[0] == scores[1] else 1 + (scores[0] < scores[1]))


PIECES = st.sampled_from(
    ["Verdict", "verdict:", "Scores:", " 1", " 2", "3", "\n", "tie", "[[", "]]", "A", "<think>", "</think>", "{",
     "}", '"', "/10", ".", "-", "**", "\u2028", "\x00", "\ud800", "٣", "²", ","]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(PIECES).map("".join)), st.sampled_from(["verdict", "scores"]))
@example('{"scores": ' + "[" * 3000 + "}", "scores")
@example('{"verdict": ' + "[" * 3000 + "]" * 3000 + "}", "verdict")
@example('{"verdict": 1e999}', "verdict")
@example('{"scores": [NaN, 2]}', "scores")
def test_nothing_breaks_it(reply: str, mode: str) -> None:
    found = read_reply(reply, mode)
    assert found.label in (1, 2, 3, -1)
    assert (found.scores is not None) == (mode == "scores" and found.label != -1)
    if found.scores is not None:
        assert all(0 <= score <= 10 for score in found.scores)


@given(st.text(), st.sampled_from([1, 2, 3]))
def test_the_last_line_is_believed_whatever_stands_before_it(before: str, label: int) -> None:
    assume("<think" not in before.lower())
    assert read_reply(f"{before}\nVerdict: {label}", "verdict").label == label


@given(st.text(), st.integers(0, 20), st.integers(0, 20))
def test_so_are_scores(before: str, first: int, second: int) -> None:
    assume("<think" not in before.lower())
    found = read_reply(f"{before}\nScores: {first / 2:g} {second / 2:g}", "scores")
    assert found.scores == (first / 2, second / 2)


@pytest.mark.parametrize(
    "piece", ["<think>", "{", "Verdict: ", "8 ", ".", " ", "[[", "verdict " * 3, "Scores: 8" + " " * 50]
)
@pytest.mark.parametrize("mode", ["verdict", "scores"])
def test_a_long_reply_is_read_in_time(piece: str, mode: str) -> None:
    began = time.process_time()
    read_reply(piece * (100_000 // len(piece)), mode)
    assert time.process_time() - began < 1.0  # it takes 0.05 s at most; a quadratic pattern would take minutes


def test_gpt4s_released_replies_are_read_as_the_authors_did(shared_data: Path) -> None:
    """4,480 verdicts, all the same. Of 5,760 pairs of scores, none that both read differs, and few say it in prose."""
    folder = shared_data / "chatbot-eval/ratings-gpt4/vicuna"
    verdicts = [json.loads(line) for path in folder.glob("pairwise/*.jsonl") for line in path.read_text().splitlines()]
    assert len(verdicts) == 4480
    assert [read_reply(review["text"], "verdict").label for review in verdicts] == [each["score"] for each in verdicts]
    scored = [json.loads(line) for path in folder.glob("relative*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(scored) == 5760
    pairs = [(read_reply(review["text"], "scores").scores, tuple(review["score"])) for review in scored]
    both = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs != (-1, -1)]
    assert all(ours == theirs for ours, theirs in both)
    assert len(both) >= 5680
    assert sum(ours is None for ours, _ in pairs) <= 25
