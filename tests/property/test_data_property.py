"""Whatever lies in a file of records: it is learned from, left out and counted, or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourbit.data.recognise import KINDS, recognise
from fourbit.data.records import Records, read_records
from fourbit.errors import InputError

pytestmark = pytest.mark.hypothesis

NAMES = sorted({name for kind in KINDS.values() for fields in kind.known_by for name in fields})
BESIDE = ["input", "context", "system", "system_prompt", "tools", "label", "rejected", "constraints"]
IN_A_MESSAGE = [
    "role",
    "from",
    "content",
    "value",
    "weight",
    "train",
    "tool_calls",
    "reasoning_content",
    "name",
    "text",
]
SAID = ["", " ", "Hi", "{}", "[", "\0", "\ud800", "false", "### Human: Hi### Assistant: Ho", "9" * 5000]
JSON = ['{"name": "f", "arguments": "{}"}', '[{"a": "\\ud800"}]']
WORDS = st.sampled_from(["user", "assistant", "system", "tool", "function_call", "gpt", *SAID, *JSON])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(st.characters(), max_size=8)
KEYS = st.sampled_from(["name", "arguments", "function", "id", *IN_A_MESSAGE, *NAMES]) | st.text(max_size=3)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
MESSAGES = st.lists(st.dictionaries(st.sampled_from(IN_A_MESSAGE), ANYTHING, max_size=5), max_size=4)
RECORDS = st.dictionaries(st.sampled_from([*NAMES, *BESIDE]) | KEYS, ANYTHING | MESSAGES, max_size=5)


@settings(max_examples=120)
@given(rows=st.lists(RECORDS, min_size=1, max_size=4))
def test_any_records(rows: list[dict[str, Any]]) -> None:
    """No other exception, whatever is nested in what; and what comes out can be printed and is what it promises."""
    complaint = ""
    try:
        found = recognise(Records("rows", rows, [f"line {number}" for number in range(len(rows))]))
    except InputError as error:
        complaint = str(error)
    if complaint:
        complaint.encode()
        assert len(complaint) < 2000
        return
    found.sentence.encode()
    assert {place for places in found.left_out.values() for place in places} <= {f"line {n}" for n in range(len(rows))}
    for example in found.examples:
        if example.messages is None:
            assert example.text
            continue
        assert all(isinstance(message["content"], str) for message in example.messages)
        assert example.messages[-1]["role"] == "assistant"
        assert len(example.messages) - 1 not in example.silent
        assert all(example.messages[number]["role"] == "assistant" for number in example.silent)
        json.dumps([example.messages, example.tools], allow_nan=True).encode()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet"]))
def test_any_bytes(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"rows{suffix}").write_bytes(content)
    _read(tmp_path / f"rows{suffix}")


@pytest.mark.parametrize("nested", [lambda n: "[" * n + "]" * n, lambda n: '{"a":' * n + "1" + "}" * n])
@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_deep_nesting(nested: Callable[[int], str], depth: int, tmp_path: Path) -> None:
    for field in ("tools", "content", "tool_calls", "role"):
        message = f'"role": "assistant", "{field}": {nested(depth)}' if field != "tools" else '"role": "user"'
        row = f'{{"messages": [{{{message}}}], "tools": {nested(depth) if field == "tools" else "[]"}}}'
        (tmp_path / "rows.jsonl").write_text(row)
        _read(tmp_path / "rows.jsonl")


def _read(path: Path) -> None:
    try:
        recognise(read_records(path, texts=True))
    except InputError as error:
        str(error).encode()
