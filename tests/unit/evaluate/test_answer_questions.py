"""Questions for answers that do not hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.evaluate.answers import read_questions


def written(folder: Path, record: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"question_id": 7, "text": "Why? ", "category": "x"}, "Why?"),
        ({"id": 7, "prompt": "Why?"}, "Why?"),
        ({"question_id": 7, "turns": ["Why?"]}, "Why?"),
        ({"question_id": 7, "turns": ["Why?", "And?"]}, "user:\nWhy?\n\nuser:\nAnd?"),
        ({"message_id": 7, "text": "### Human: Hi ### Assistant: Yes? ### Human: Why? ### Assistant:"},
         "user:\nHi\n\nassistant:\nYes?\n\nuser:\nWhy?"),
        ({"id": 7, "messages": [{"role": "system", "content": "Hm."}, {"role": "user", "content": "Why?"}]}, "Why?"),
    ],
)  # fmt: skip
def test_as_the_judge_reads_them(record: dict[str, Any], question: str, tmp_path: Path) -> None:
    assert read_questions(written(tmp_path, record)) == {"7": question}


def test_what_holds_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 1: the record holds no prompt"):
        read_questions(written(tmp_path, {"id": 1, "answer": "So."}))
    with pytest.raises(InputError, match="does not exist"):
        read_questions(tmp_path / "none.jsonl")
