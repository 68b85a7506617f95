"""Documents out of files, good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourbit.errors import InputError
from fourbit.evaluate import read_documents


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_plain_text_is_taken_byte_for_byte(tmp_path: Path) -> None:
    assert list(read_documents(write(tmp_path / "a.txt", " a\r\n\u2028b\x0c\n"))) == [" a\r\n\u2028b\x0c\n"]
    assert list(read_documents(write(tmp_path / "a.md", "\ufeffa"))) == ["a"]


def test_plain_text_in_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n<end>\n two <end><end>")
    assert list(read_documents(path, separator="<end>")) == ["one", "two", "", ""]


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in ("one", "t\u2028wo", "")]
    path = write(tmp_path / "a.jsonl", "\n".join(lines[:2]) + "\r\n\n" + lines[2])
    assert list(read_documents(path)) == ["one", "t\u2028wo", ""]
    assert list(read_documents(write(tmp_path / "a.JSON", json.dumps([{"body": "x"}])), field="body")) == ["x"]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {number}" for number in range(3000)]
    parquet.write_table(arrow.table({"id": range(3000), "text": texts}), tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == texts
    with pytest.raises(InputError, match=r"row 1: the record has no field 'body'; it has 'id', 'text'"):
        list(read_documents(tmp_path / "a.parquet", field="body"))
    with pytest.raises(InputError, match=r"row 1: the field 'id' must be a string, not 0"):
        list(read_documents(tmp_path / "a.parquet", field="id"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"a\.jsonl, line 2 is not valid JSON"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n["b"]',
            r"line 3: a record must be a JSON object, not a list",
        ),
        ("a.jsonl", '{"body": "a", "id": 3}', r"line 1: the record has no field 'text'; it has 'body', 'id'"),
        ("a.jsonl", "{}", "it has none"),
        ("a.jsonl", '{"text": null}', "must be a string, not null"),
        ("a.jsonl", '{"text": true}', "must be a string, not true"),
        ("a.jsonl", '{"text": "\\ud800"}', "surrogate"),
        ("a.jsonl", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", "\n", r"a\.jsonl holds no records"),
        ("a.json", '{"text": "a"}', "must hold a JSON list of records, not an object"),
        ("a.json", '[{"text": "a"}, 3]', "record 2: .* not a number"),
        ("a.parquet", "PAR1 nonsense", r"a\.parquet is no parquet file that can be read"),
    ],
)
def test_a_bad_file_is_named(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("datasets")
    with pytest.raises(InputError, match=says):
        list(read_documents(write(tmp_path / name, content)))


def test_a_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_documents(tmp_path / "missing.txt")
    with pytest.raises(InputError, match="is a folder"):
        read_documents(tmp_path)


def test_a_separator_that_does_not_apply(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already holds one document per record"):
        read_documents(write(tmp_path / "a.jsonl", "{}"), separator="x")
    with pytest.raises(InputError, match="separator is empty"):
        list(read_documents(write(tmp_path / "a.txt", "x"), separator=""))
