"""Reading records: every kind of file, and everything that can be wrong with one."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fourbit.data.records import read_records
from fourbit.errors import InputError, MissingExtra

ROWS: list[dict[str, Any]] = [{"prompt": "007", "completion": "Bond, James"}, {"prompt": 'a "b"', "completion": "ü\nc"}]


def written(path: Path) -> Path:
    """ROWS as a file of the kind that its name says."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    else:
        from datasets import Dataset

        if path.suffix == ".parquet":
            Dataset.from_list(ROWS).to_parquet(path)
        else:
            Dataset.from_list(ROWS).to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"])
def test_kinds_of_files(suffix: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"rows{suffix}")
    assert read_records(path).rows == ROWS
    assert read_records(path, limit=1).rows == ROWS[:1]


def test_a_list_inside_an_object(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read_records(tmp_path / "rows.json").rows == ROWS


def test_a_folder_and_what_it_holds_out(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl")
    written(tmp_path / "b.parquet")
    written(tmp_path / "test.jsonl")
    (tmp_path / "README.md").write_text("not data")
    found = read_records(tmp_path)
    assert found.rows == ROWS + ROWS
    assert found.evaluation is not None
    assert found.evaluation.rows == ROWS
    assert read_records(tmp_path, split="b").rows == ROWS


def test_what_lies_beside_the_data_is_left_out(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl")
    (tmp_path / "dataset_infos.json").write_text('{"a": 1}')
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.json").write_text("{")
    assert read_records(tmp_path).rows == ROWS


def test_json_lines_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_records(path).rows == ROWS
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(InputError, match=r"rows\.json, line 2 is not valid JSON"):
        read_records(path)
    path.write_text(json.dumps({"data": ROWS}, indent=1))
    assert read_records(path).rows == ROWS


def test_tables_and_lines_need_no_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [written(tmp_path / name) for name in ("a.csv", "a.jsonl", "a.parquet")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert [read_records(path).rows for path in paths[:2]] == [ROWS, ROWS]
    with pytest.raises(MissingExtra, match=r"pip install 'fourbit\[train\]'"):
        read_records(paths[2])


def test_places(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl")
    assert read_records(path).places == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: a record must be a JSON object, not a list"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"line 1 is not valid JSON: Exceeds the limit \(4300 digits\)"),
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"caf\xe9", "not UTF-8"),
        ("a.json", b"[]", "holds no records"),
        ("a.json", b'{"a": 1}', "must hold a JSON list of records, not an object"),
        ("a.json", b"[{]", "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b'a,b\n"1,2\n', "no CSV file that can be read"),
        ("a.csv", b"a,b\n1,2,3\n", "row 1 has not as many cells as the header"),
        ("a.parquet", b"PAR1 not really", "no parquet file that can be read"),
        ("a.txt", b"text", "of no kind that can be read"),
    ],
)
def test_broken_files(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_records(tmp_path / name)


def test_a_long_cell(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    for name, tab in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"prompt{tab}completion\nHi{tab}{'Ho ' * 100_000}\n")
        (row,) = read_records(tmp_path / name).rows
        assert row["completion"] == "Ho " * 100_000
    assert csv.field_size_limit() == before


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\ufeffOnce.\n\nUpon a time.\n", encoding="utf-8")
    found = read_records(path, texts=True)
    assert (found.rows, found.places) == ([{"text": "Once.\n\nUpon a time.\n"}], [str(path)])
    assert found.is_plain_text
    path.write_text("One.\n<|endoftext|>\n\n<|endoftext|>\nTwo <|endoftext|> here.\n")
    found = read_records(path, texts=True)
    assert [row["text"] for row in found.rows] == ["One.", "Two <|endoftext|> here."]
    assert found.places == [f"{path}, document 1", f"{path}, document 3"]
    (tmp_path / "test.txt").write_text("Held out.")
    folder = read_records(tmp_path, texts=True)
    assert folder.evaluation is not None
    assert [row["text"] for row in folder.evaluation.rows] == ["Held out."]
    written(tmp_path / "a.jsonl")  # then a text beside it is no data, but a README, say
    assert read_records(tmp_path, texts=True).rows == ROWS
    path.write_text("\n")
    with pytest.raises(InputError, match=r"book\.txt holds no records"):
        read_records(path, texts=True)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl does not exist"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(InputError, match="holds no file to read"):
        read_records(tmp_path)
    with pytest.raises(InputError, match="at least one record"):
        read_records(tmp_path, limit=0)
    written(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="no file with 'holdout'"):
        read_records(tmp_path, split="holdout")


def test_a_hub_name_without_the_hub() -> None:
    with pytest.raises(InputError, match=r"someone/something is no file or folder here, .* cannot be reached"):
        read_records("someone/something")
