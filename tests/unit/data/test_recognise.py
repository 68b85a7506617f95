"""What records are recognised as, and the conversations that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourbit.data.recognise import Recognised, recognise
from fourbit.data.records import Records, read_records
from fourbit.errors import InputError


def recognised(*rows: dict[str, Any]) -> Recognised:
    return recognise(Records("rows.jsonl", list(rows), [f"rows.jsonl, line {n}" for n in range(1, len(rows) + 1)]))


def turns(*rows: dict[str, Any]) -> list[list[tuple[str, str]] | str]:
    """Each example's roles and contents, or its text."""
    return [
        example.text or [(turn["role"], turn["content"]) for turn in example.messages or ()]
        for example in recognised(*rows).examples
    ]


HI, HO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
ASKED = [("user", "Hi"), ("assistant", "Ho")]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [HI, HO]}, "conversation"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "conversation"),
        ({"instruction": "Hi", "input": "", "output": "Ho", "text": "Below is ..."}, "alpaca"),
        ({"instruction": "Hi", "context": "", "response": "Ho"}, "alpaca"),
        ({"prompt": "Hi", "completion": "Ho<|endoftext|>"}, "prompt-completion"),
        ({"prompt": [HI], "completion": [HO]}, "prompt-completion"),
        ({"inputs": "Hi", "targets": "Ho"}, "prompt-completion"),
        ({"input": "### Human: Hi### Assistant:", "output": "Ho"}, "prompt-completion"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, "preference"),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, "preference"),
        ({"prompt": "Hi", "chosen": [HI, HO]}, "preference"),
        ({"prompt": "Hi", "chosen": [HO]}, "preference"),
        ({"instruction": "Hi", "instances": [{"input": "", "output": "Ho"}]}, "self-instruct"),
        ({"text": "### Human: Hi### Assistant: Ho"}, "text"),
        ({"text": "<human>: Hi\n<bot>: Ho"}, "text"),
    ],
)  # fmt: skip
def test_kinds(row: dict[str, Any], kind: str) -> None:
    assert recognised(row).kind == kind
    assert turns(row) == [ASKED]


def test_an_input_joins_its_instruction() -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}]}
    assert turns(row) == [
        [("user", "Add.\n\n1 2"), ("assistant", "3")],
        [("user", "Add.\n\n2 2"), ("assistant", "4")],
    ]


def test_plain_text_stays_as_it_is() -> None:
    assert turns({"text": " Once upon a time.\n"}) == [" Once upon a time.\n"]


def test_what_follows_the_last_answer_goes() -> None:
    chosen = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Bye\n\nAssistant:"
    assert turns({"chosen": chosen}) == [ASKED]


def test_a_system_field_becomes_a_turn() -> None:
    assert turns({"system": "Be brief.", "prompt": "Hi", "response": "Ho"}) == [[("system", "Be brief."), *ASKED]]


def test_the_sentence_and_the_counts() -> None:
    good = {"instruction": "Hi", "input": "", "output": "Ho"}
    found = recognised(good, good | {"output": " "}, good | {"output": None}, good)
    assert (found.records, len(found.examples), found.empty) == (4, 2, 2)
    assert found.sentence == (
        "Recognised Alpaca records by `instruction` and `output`: 4 records, 2 examples."
        " Left out, without an answer: 2."
    )


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"foo": 1, "bar": 2}], r"no known kind of record has the fields foo, bar\. Known are .*`messages`"),
        (
            [{"prompt": "a", "completion": "b"}, {"query": "a"}],
            "line 2: this record has the fields query, but",
        ),
        ([{"messages": "Hi"}], r"line 1: the conversation must be a list of messages, not str"),
        ([{"messages": [{"role": "wizard", "content": "Hi"}]}], r"line 1: message 1 has the role 'wizard'"),
        ([{"messages": ["Hi"]}], r"line 1: message 1 must have a role and a content"),
        ([{"prompt": "Hi", "completion": {"a": 1}}], r"line 1: `completion` must be text, not dict"),
        ([{"prompt": "Hi", "completion": "\ud83d"}], r"half of a surrogate pair"),
        ([{"instruction": "Hi", "instances": [{"input": ""}]}], r"every instance needs an `output`"),
        ([{"chosen": "Ho"}], r"no transcript"),
    ],
)
def test_what_cannot_be_used(rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        recognised(*rows)


@pytest.mark.parametrize(
    ("path", "kind", "examples"),
    [
        ("alpaca/alpaca_100.json", "alpaca", 100),
        ("alpaca/alpaca_gpt4style_999.json", "alpaca", 999),
        ("self-instruct/seed_tasks.jsonl", "self-instruct", 175),
        ("self-instruct/user_oriented_instructions.jsonl", "self-instruct", 252),
        ("t0-p3", "prompt-completion", 800),
        ("hh-rlhf/harmless_400.jsonl", "preference", 400),
        ("oasst/oa_questions_300.jsonl", "prompt-completion", 300),
    ],
)
def test_real_data(path: str, kind: str, examples: int, shared_data: Path) -> None:
    found = recognise(read_records(shared_data / path))
    assert (found.kind, len(found.examples), found.empty) == (kind, examples, 0)
    assert all(example.messages and example.messages[0]["role"] == "user" for example in found.examples)
