"""The cache: what was committed is there, what was sent and never answered is remembered."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fourbit.errors import InputError
from fourbit.evaluate.judge.store import Reply, Store

REPLY = Reply("Verdict: 1", "stop", 100, 10, True, 1.5)


def test_a_reply_is_kept_and_its_question_struck_out(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with Store(path) as store:
        answered, lost, free = (store.send(key, 200, 20) for key in ("answered", "lost", "free"))
        store.keep(answered, "answered", "toy", REPLY)
        store.strike(free)
        assert lost not in (answered, free)
    with Store(path) as store:
        keys = ["answered", "lost", "free", "answered"]
        assert store.replies(keys) == {"answered": REPLY}
        assert store.uncertain(keys) == [(200, 20)]
        assert store.replies(str(number) for number in range(2000)) == {}
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_nothing_is_left_of_a_run_that_came_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "folder/cache.sqlite"
    with Store(path) as store:
        store.strike(store.send("key", 1, 1))
    assert list((tmp_path / "folder").iterdir()) == []


def test_looking_makes_no_file(tmp_path: Path) -> None:
    with Store(tmp_path / "cache.sqlite", read_only=True) as store:
        assert store.replies(["key"]) == {}
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with Store(path) as store:
        store.keep(store.send("key", 1, 1), "key", "toy", REPLY)
        for read_only in (False, True):
            with pytest.raises(InputError, match="another fourbit judge"):
                Store(path, read_only=read_only)


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 2000])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cache\.sqlite"):
        Store(path)
    assert path.read_bytes() == content


def test_a_database_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE votes (id)")
    connection.close()
    with pytest.raises(InputError, match="another program"):
        Store(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((InputError, OSError), match="file"):
        Store(tmp_path / "file/cache.sqlite")
