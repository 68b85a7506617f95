"""What records are recognised as, and the conversations that come of them."""

from __future__ import annotations

import json
import math
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
        ([{"messages": [{"role": ["user"], "content": "Hi"}]}], r"line 1: message 1 has the role \['user'\]"),
        ([{"messages": [{"role": "x" * 999, "content": "Hi"}]}], r"message 1 has the role 'x{50,60}…"),
        ([{"messages": [HO | {"weight": 0.5}]}], r"`weight` of message 1 is 0\.5; only 0"),
        ([{"messages": [HO | {"train": "no"}]}], r"`train` of message 1 is 'no'; it must be true or false"),
        ([{"messages": [HO], "tools": "hammer"}], r"`tools` must be JSON"),
        ([{"messages": [HO], "tools": [1]}], r"`tools` must be a list of objects"),
        ([{"messages": [HO | {"tool_calls": [{}]}]}], r"a tool call of message 1 has no `name`"),
        ([{"\ud800": 1}], r"has the fields \\ud800\."),
    ],
)
def test_what_cannot_be_used(rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        recognised(*rows)


BYE, NOTHING = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("rows", "silent", "says"),
    [
        ([HI, NOTHING, BYE, HO], {1}, "Without loss, as they are empty: 1 answers."),
        ([HI, HO | {"weight": 0}, BYE, HO | {"weight": 1}], {1}, "Without loss, as the data says so"),
        ([HI, HO | {"train": False}, BYE, HO], {1}, "Without loss, as the data says so"),
        ([HI, HO | {"training": False}, BYE, HO, HI, NOTHING], {1}, "Without loss, as the data says so"),
        ([HI, HO, BYE, HO], set(), "1 examples."),
    ],
)
def test_answers_that_carry_no_loss(rows: list[dict[str, Any]], silent: set[int], says: str) -> None:
    found = recognised({"messages": rows})
    (example,) = found.examples
    assert example.silent == silent
    assert example.messages is not None
    assert all(message.keys() == {"role", "content"} for message in example.messages)
    assert says in found.sentence


def test_records_of_which_nothing_is_wanted() -> None:
    good = {"prompt": "Hi", "completion": "Ho", "label": True}
    found = recognised(good, good | {"label": False}, good | {"label": "False"}, good | {"label": 0})
    assert (len(found.examples), found.empty) == (2, 2)
    assert found.sentence.endswith("Left out, as their `label` says that the answer is a bad one: 2.")
    found = recognised({"messages": [HI, HO]}, {"messages": [HI, HO | {"weight": 0}]}, {"messages": [HI]})
    assert found.left_out == {
        "as they ask for no loss on any of their answers": ["rows.jsonl, line 2"],
        "without an answer": ["rows.jsonl, line 3"],
    }


def test_conversations_with_tools() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    spelled = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    told = {"role": "tool", "name": "weather", "content": "sunny", "score": None}
    row = {
        "tools": '[{"name": "weather", "strict": null}]',
        "messages": [HI, NOTHING | {"tool_calls": [spelled]}, told],
    }
    row["messages"].append(HO | {"reasoning_content": "Hm."})  # type: ignore[attr-defined]
    shared = {"conversations": [
        {"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "sunny"}, {"from": "gpt", "value": "Ho"},
    ]}  # fmt: skip
    first, second = recognised(row, {"messages": shared["conversations"]}).examples
    assert first.messages is not None
    assert second.messages is not None
    assert first.tools == ({"name": "weather"},)  # without the nulls that a column of parquet fills in
    (called,) = first.messages[1]["tool_calls"]
    assert called == {"id": "1", "type": "function", "function": call}
    assert first.messages[2] == {"role": "tool", "name": "weather", "content": "sunny"}
    assert first.messages[3]["reasoning_content"] == "Hm."
    assert [message["role"] for message in second.messages] == ["user", "assistant", "tool", "assistant"]
    assert second.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert not first.silent | second.silent


def test_what_stands_for_nothing_in_a_table() -> None:
    found = recognised({"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "completion": math.nan})
    assert (len(found.examples), found.empty) == (1, 1)


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
