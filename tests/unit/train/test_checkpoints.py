"""A checkpoint is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourbit.files import replace_file
from fourbit.train import checkpoints


def write(output: Path, step: int) -> Path:
    folder = output / f"checkpoint-{step}"
    with checkpoints.writing(folder) as unfinished:
        (unfinished / "adapter.bin").write_bytes(bytes(range(100)))
        (unfinished / "sub").mkdir()
        (unfinished / "sub" / "state.json").write_text("{}")
    return folder


def test_the_newest_one_is_found(tmp_path: Path) -> None:
    assert checkpoints.find_newest(tmp_path) == (None, [])
    for step in (9, 10, 2):
        write(tmp_path, step)
    newest, _ = checkpoints.find_newest(tmp_path)
    assert newest is not None
    assert checkpoints.step_of(newest) == 10
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [2, 9, 10]


@pytest.mark.parametrize("fault", ["cut", "changed", "missing", "no manifest", "empty manifest", "no json"])
def test_a_broken_one_is_passed_over(tmp_path: Path, fault: str) -> None:
    write(tmp_path, 1)
    broken = write(tmp_path, 2)
    file, manifest = broken / "adapter.bin", broken / "manifest.json"
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif fault == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    elif fault == "missing":
        (broken / "sub" / "state.json").unlink()
    elif fault == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{}" if fault == "empty manifest" else "{")
    assert checkpoints.find_fault(broken) is not None
    assert checkpoints.find_newest(tmp_path)[0] == tmp_path / "checkpoint-1"


def test_nothing_is_left_of_one_that_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with checkpoints.writing(tmp_path / "checkpoint-1") as unfinished:
            (unfinished / "adapter.bin").write_bytes(b"half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_never_found_and_swept_away(tmp_path: Path) -> None:
    write(tmp_path, 1)
    half = tmp_path / ".checkpoint-2.unfinished"
    half.mkdir()
    (half / "adapter.bin").write_bytes(b"half")
    (tmp_path / ".report.html.unfinished").write_text("half")
    assert checkpoints.find_newest(tmp_path)[0] == tmp_path / "checkpoint-1"
    checkpoints.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_step_is_written_again_over_what_was_there(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    (folder / "stale.bin").write_bytes(b"old")
    write(tmp_path, 1)
    assert checkpoints.find_fault(folder) is None
    assert not (folder / "stale.bin").exists()


def test_old_ones_are_forgotten_but_not_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.forget_old(tmp_path / "checkpoint-4", keep=2, best="elsewhere/checkpoint-1")
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
    checkpoints.forget_old(tmp_path / "checkpoint-4", keep=None, best=None)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 3


def test_later_ones_that_are_damaged_do_not_count(tmp_path: Path) -> None:
    """A run that passed over a damaged checkpoint must not delete its newest whole one in favour of that."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    checkpoints.forget_old(tmp_path / "checkpoint-2", keep=1, best=None)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    replace_file(path, "old")
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
