"""Rows to a file and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fourbit.bench import rows
from fourbit.bench.rows import Row
from fourbit.errors import InputError


def test_there_and_back(row: Callable[..., Row], tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    first = [row("fourbit", 12.5, share=0.25, share_of="limit: copy"), row('a, "quoted" one', 1.5, others=None)]
    second = [row("fourbit", 13.5, run="2026-02-02T00:00:00Z")]
    rows.append(path, first)
    rows.append(path, second)
    assert rows.read(path) == first + second
    assert path.read_text().count("median") == 1
    assert b"\r" not in path.read_bytes()


def test_a_file_from_before_a_column_was_added_stays_readable(row: Callable[..., Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.append(path, [row("fourbit", 12.5)])
    later = ",device,peak_device_bytes,libraries"
    assert later in path.read_text()
    head, _, line = path.read_text().partition("\n")
    old = f"{head.removesuffix(later)}\n{line.strip().removesuffix(',,0,')}\n"
    path.write_text(old)
    assert rows.read(path) == [row("fourbit", 12.5)]
    rows.append(path, [row("new", 1.5, device="a GPU", peak_device_bytes=7)])
    assert rows.read(path) == [row("fourbit", 12.5), row("new", 1.5, device="a GPU", peak_device_bytes=7)]
    assert path.read_text().startswith(head)
    path.write_text(old.replace(",others\n", "\n"))  # a column that was always there
    with pytest.raises(InputError, match="not a file of benchmark rows"):
        rows.read(path)


def test_the_last_run_of_each_case_counts(row: Callable[..., Row]) -> None:
    later = {"run": "2026-02-02T00:00:00Z"}
    found = rows.latest(
        [row("a", 1), row("b", 2), row("a", 3, case="load"), row("a", 4, **later), row("c", 5, **later)]
    )
    assert {case: [(one.contender, one.median) for one in kept] for case, kept in found.items()} == {
        "quantize-nf4": [("a", 4), ("c", 5)],
        "load": [("a", 3)],
    }


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", b"\xff\xfe\x00"])
def test_a_file_of_another_kind_is_left_alone(content: str | bytes, row: Callable[..., Row], tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    before = content.encode() if isinstance(content, str) else content
    path.write_bytes(before)
    with pytest.raises(InputError, match=r"other\.csv"):
        rows.append(path, [row("fourbit", 1)])
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", "rows.csv/below.csv"])
def test_a_path_that_cannot_be_written_is_named(name: str, row: Callable[..., Row], tmp_path: Path) -> None:
    rows.append(tmp_path / "rows.csv", [row("fourbit", 1)])
    with pytest.raises(InputError, match=r"cannot be written: .*; give another name\."):
        rows.check(tmp_path / name)


def test_a_check_leaves_no_file_and_changes_none(row: Callable[..., Row], tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows.check(path)
    assert not path.exists()
    rows.append(path, [row("fourbit", 1)])
    before = path.read_bytes()
    rows.check(path)
    assert path.read_bytes() == before


def test_a_damaged_row_is_reported(row: Callable[..., Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows.append(path, [row("fourbit", 1)])
    path.write_text(path.read_text().replace("24000000000", "much"))
    with pytest.raises(InputError, match=r"rows\.csv holds a row that cannot be read"):
        rows.read(path)
    path.write_text(
        "\n".join(
            line.rpartition(",")[0] if index else line for index, line in enumerate(path.read_text().splitlines())
        )
    )
    with pytest.raises(InputError, match="cannot be read"):
        rows.read(path)
