"""The records of a file of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.generate.prompts import Asked, read_prompts, read_transcript


def written(folder: Path, *records: Any, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def only(folder: Path, record: Any, **settings: Any) -> Asked:
    (asked,) = read_prompts(written(folder, record), **settings)
    return asked


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("record", "key", "asked"),
    [
        ({"id": 7, "prompt": "Hi"}, 7, user("Hi")),
        ({"question_id": "q", "prompt": "Hi"}, "q", user("Hi")),
        ({"message_id": "m", "prompt": user("Hi")}, "m", user("Hi")),
        ({"id": "a", "question_id": "b", "messages": user("Hi")}, "a", user("Hi")),
        ({"id": None, "text": "Once"}, 1, "Once"),
        ({"text": "Once", "category": "stories"}, 1, "Once"),
        ({"question_id": 3, "text": "What?"}, 3, user("What?")),
        ({"messages": user("Hi"), "prompt": "not this", "text": "nor this"}, 1, user("Hi")),
        ({"prompt": "Hi", "text": "not this"}, 1, user("Hi")),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Bo"}]}, 1, user("Hi")),
    ],
)
def test_the_fields(record: dict[str, Any], key: str | int, asked: Any, tmp_path: Path) -> None:
    found = only(tmp_path, record)
    assert (found.id, found.asked) == (key, asked)
    assert found.given == next(record[name] for name in ("messages", "prompt", "text") if name in record)


def test_the_modes(tmp_path: Path) -> None:
    assert only(tmp_path, {"text": "Once"}, mode="chat").asked == user("Once")
    assert only(tmp_path, {"prompt": "Once"}, mode="text").asked == "Once"
    assert only(tmp_path, {"question_id": 1, "text": "### Human: a ### Assistant:"}, mode="text").asked[:3] == "###"
    with pytest.raises(InputError, match="line 1: it holds a conversation"):
        only(tmp_path, {"messages": user("Hi")}, mode="text")
    with pytest.raises(InputError, match="must be one of auto, chat, text"):
        only(tmp_path, {"text": "Once"}, mode="talk")


def test_turns(tmp_path: Path) -> None:
    one = only(tmp_path, {"question_id": 1, "turns": ["Hi"], "category": "x"})
    assert (one.given, one.asked, one.later) == ("Hi", user("Hi"), ())
    three = only(tmp_path, {"question_id": 1, "turns": ["Hi", "Why?", "Bye"]}, system="Be kind.")
    assert three.given == [*user("Hi"), *user("Why?"), *user("Bye")]
    assert three.asked == [{"role": "system", "content": "Be kind."}, *user("Hi")]
    assert three.later == ("Why?", "Bye")
    assert only(tmp_path, {"turns": ["Hi"]}, mode="text").asked == "Hi"
    with pytest.raises(InputError, match="line 1: it holds a conversation"):
        only(tmp_path, {"turns": ["Hi", "Why?"]}, mode="text")


@pytest.mark.parametrize("turns", ["Hi", [], [1], ["Hi", None], ["Hi", " "], {"user": "Hi"}])
def test_turns_that_are_none(turns: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: .*turns"):
        only(tmp_path, {"turns": turns})


def test_what_the_system_says(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    assert only(tmp_path, {"prompt": "Hi"}, system="Be kind.").asked == [system, *user("Hi")]
    own = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    assert only(tmp_path, {"messages": own}, system="Be kind.").asked == own
    assert only(tmp_path, {"text": "Once"}, system="Be kind.").asked == "Once"


def test_a_list_in_a_json_file(tmp_path: Path) -> None:
    path = written(tmp_path, '[{"id": 1, "prompt": "a"},\n', '{"id": 2, "prompt": "b"}]', name="prompts.json")
    assert [asked.id for asked in read_prompts(path)] == [1, 2]


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n{"text": "c"}'.encode())
    assert [(asked.asked, asked.where) for asked in read_prompts(path)] == [
        ("a\u2028b", f"{path}, line 1"),
        ("c", f"{path}, line 3"),
    ]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ('{"prompt": "a"', "line 2 is not valid JSON"),
        ("[1]", "line 2: a record must be a JSON object"),
        ({"instruction": "a", "output": "b"}, "line 2: the record holds no prompt, text, messages or turns; it"),
        ({}, "it has nothing"),
        ({"prompt": " "}, "line 2: the field 'prompt' is empty"),
        ({"prompt": 3}, "line 2: the field 'prompt' must be text or a list"),
        ({"text": ["a"]}, "line 2: the field 'text' must be text"),
        ({"messages": "a"}, "line 2: the field 'messages' must be a list"),
        ({"messages": []}, "line 2: the field 'messages' is an empty conversation"),
        ({"messages": [{"role": "user"}]}, "line 2: message 1 must have a role and a content"),
        ({"messages": [{"role": "user", "content": 1}]}, "line 2: the field 'content' must be text"),
        ({"id": 1.5, "prompt": "a"}, "line 2: the id must be text or a whole number"),
        ({"question_id": True, "prompt": "a"}, "line 2: the question_id must be"),
        ({"id": "1", "prompt": "a"}, "line 2: the id '1' is that of .*line 1 already"),
    ],
)
def test_a_broken_record_is_named_by_its_line(record: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_prompts(written(tmp_path, {"id": 1, "prompt": "fine"}, record))
    assert "prompts.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", b"\n \n", "holds no records"),
        ("p.json", b"[]", "holds no records"),
        ("p.json", b'{"prompt": "a"}', "must hold a JSON list"),
        ("p.json", b"[[[[", "not valid JSON"),
        ("p.jsonl", b"caf\xe9", "not UTF-8"),
        ("p.txt", b"Hi", "no kind that can be read"),
        ("p.jsonl", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_file(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_prompts(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_prompts(tmp_path / "none")
    with pytest.raises(InputError, match="is a folder"):
        read_prompts(tmp_path)


def test_a_transcript_is_taken_apart() -> None:
    assert read_transcript("### Human: a b ### Assistant: c\n\n### Human: d ### Assistant:") == [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert read_transcript("Be kind. ### Human: a ### Assistant:") == [
        {"role": "system", "content": "Be kind."},
        *user("a"),
    ]
    for text in ("Once", "### Human: a", "### Assistant:", "### Human: a ### Assistant: b"):
        assert read_transcript(text) is None


def test_the_questions_of_others(shared_data: Path) -> None:
    """All 80 of Vicuna's and the 300 of OpenAssistant's are conversations that wait for an answer."""
    vicuna = read_prompts(shared_data / "chatbot-eval/prompts/vicuna_questions.jsonl")
    assert [asked.id for asked in vicuna] == list(range(1, 81))
    assert all(len(asked.asked) == 1 for asked in vicuna)
    oasst = read_prompts(shared_data / "oasst/oa_questions_300.jsonl")
    assert len(oasst) == 300
    for asked in oasst:
        turns = asked.asked
        assert not isinstance(turns, str)
        assert [turn["role"] for turn in turns[:2]] == ["system", "user"]
        assert turns[-1]["role"] == "user"
        assert "###" not in turns[-1]["content"] or "### Human:" not in turns[-1]["content"]
