"""The file of answers: taken up again, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fourbit.errors import OutputExists
from fourbit.generate.answer_file import AnswerFile
from fourbit.generate.answers import Answer
from fourbit.generate.prompts import Asked

ASKED = [Asked(name, f"say {name}", f"say {name}", "here") for name in ("a", "b", "c", "d")]
SETTINGS = {"temperature": 0.7, "stop": ("x",), "model_files": "1"}


def answer(text: str) -> Answer:
    return Answer(text, (5, 6), "stop")


def write(path: Path, answers: dict[int, Answer], *, finish: bool = False, **arguments: Any) -> None:
    with AnswerFile(path, ASKED, SETTINGS, **arguments) as file:
        file.append({index: [answer] for index, answer in answers.items()})
        if finish:
            file.finish()


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "answers.jsonl"


def test_a_record(path: Path) -> None:
    write(path, {1: answer("Grüße\n")})
    assert path.read_text(encoding="utf-8") == (
        '{"id": "b", "prompt": "say b", "text": "Grüße\\n", "tokens": 2, "finish_reason": "stop"}\n'
    )


def test_a_record_of_several_turns(path: Path) -> None:
    given = [{"role": "user", "content": each} for each in ("Hi", "Why?")]
    asked = Asked("a", given, given[:1], "here", later=("Why?",))
    with AnswerFile(path, [asked], SETTINGS) as file:
        file.append({0: [answer("Hello."), Answer("So.", (7,), "length")]})
        file.finish()
    assert json.loads(path.read_text()) == {
        "id": "a",
        "prompt": given,
        "text": "Answer 1:\nHello.\n\nAnswer 2:\nSo.",
        "tokens": 3,
        "finish_reason": "length",
        "answers": ["Hello.", "So."],
    }
    assert AnswerFile(path, [asked], SETTINGS).done == {0}


def test_what_is_there_is_kept_and_put_in_order(path: Path) -> None:
    write(path, {2: answer("2"), 0: answer("0")})
    file = AnswerFile(path, ASKED, SETTINGS)
    assert file.done == {0, 2}
    with file:
        file.append({3: [answer("3")], 1: [answer("1")]})
        assert ids(path) == ["c", "a", "d", "b"]
        file.finish()
    assert ids(path) == ["a", "b", "c", "d"]
    assert AnswerFile(path, ASKED, SETTINGS).done == {0, 1, 2, 3}
    assert sorted(each.name for each in path.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.settings.json"]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_off_is_dropped(cut: int, path: Path) -> None:
    write(path, {0: answer("0"), 1: answer("1")})
    os.truncate(path, path.stat().st_size - cut)
    file = AnswerFile(path, ASKED, SETTINGS)
    assert file.done == {0}
    with file:
        file.append({1: [answer("new")]})
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["0", "new"]


def test_looking_writes_nothing(path: Path) -> None:
    assert AnswerFile(path, ASKED, SETTINGS).done == set()
    assert not path.parent.exists()
    write(path, {0: answer("0")})
    before = {each: each.read_bytes() for each in path.parent.iterdir()}
    AnswerFile(path, ASKED, SETTINGS)
    AnswerFile(path, ASKED, SETTINGS, overwrite=True)
    assert {each: each.read_bytes() for each in path.parent.iterdir()} == before


def test_overwriting(path: Path) -> None:
    write(path, {0: answer("0"), 1: answer("1")})
    write(path, {2: answer("2")}, overwrite=True)
    assert ids(path) == ["c"]


def test_an_empty_file_is_nobodys(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    write(path, {0: answer("0")})
    assert ids(path) == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_is_not_ours(overwrite: bool, path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"id": "a"}\n')
    with pytest.raises(OutputExists, match="was not written by fourbit"):
        AnswerFile(path, ASKED, SETTINGS, overwrite=overwrite)
    path.with_name("answers.jsonl.settings.json").write_text('{"temperature": 1}')
    with pytest.raises(OutputExists, match=r"settings\.json exists and was not written by fourbit"):
        AnswerFile(path, ASKED, SETTINGS, overwrite=overwrite)
    path.unlink()
    with pytest.raises(OutputExists, match=r"settings\.json exists and was not written by fourbit"):
        AnswerFile(path, ASKED, SETTINGS, overwrite=overwrite)


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(OutputExists, match="no ordinary file"):
            AnswerFile(path, ASKED, SETTINGS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": 0.0}, r"with temperature 0\.7, and now it is 0\.0"),
        ({"stop": ()}, r"with stop \['x'\], and now it is \[\]"),
        ({"dtype": "float32"}, "with dtype the default, and now it is 'float32'"),
        ({"model_files": "2"}, "another state of the model"),
    ],
)
def test_other_settings(change: dict[str, Any], says: str, path: Path) -> None:
    write(path, {0: answer("0")})
    with pytest.raises(OutputExists, match=says):
        AnswerFile(path, ASKED, SETTINGS | change)
    assert AnswerFile(path, ASKED, SETTINGS | change, overwrite=True).done == set()


def test_other_prompts(path: Path) -> None:
    write(path, {0: answer("0"), 3: answer("3")})
    more = [*ASKED[::-1], Asked(9, "new", "new", "here")]
    assert AnswerFile(path, more, SETTINGS).done == {0, 3}
    with pytest.raises(OutputExists, match="line 2: the answer with the id 'd' is not asked for now"):
        AnswerFile(path, ASKED[:3], SETTINGS)
    changed = [Asked("a", "say A", "say A", "here"), *ASKED[1:]]
    with pytest.raises(OutputExists, match="line 1: the answer with the id 'a' belongs to another prompt"):
        AnswerFile(path, changed, SETTINGS)


@pytest.mark.parametrize(
    ("line", "says"),
    [("nonsense", "not an answer"), ("[1]", "not an answer"), ('{"id": "b"}', "not an answer"), (None, "twice")],
)
def test_a_line_that_we_did_not_write(line: str | None, says: str, path: Path) -> None:
    write(path, {0: answer("0")})
    with path.open("a") as file:
        file.write(f"{line}\n" if line else path.read_text())
    with pytest.raises(OutputExists, match=f"line 2.* {says}"):
        AnswerFile(path, ASKED, SETTINGS)


def test_two_at_a_time(path: Path) -> None:
    first, second = AnswerFile(path, ASKED, SETTINGS), AnswerFile(path, ASKED, SETTINGS)
    with first:
        with pytest.raises(OutputExists, match="being written by another"), second:
            pass
        first.append({0: [answer("0")]})
    with pytest.raises(OutputExists, match="written to by another process meanwhile"), second:
        pass
    assert ids(path) == ["a"]


def test_it_must_be_open(path: Path) -> None:
    with pytest.raises(ValueError, match="not open"):
        AnswerFile(path, ASKED, SETTINGS).append({})
