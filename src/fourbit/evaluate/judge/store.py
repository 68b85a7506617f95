"""Every reply that was paid for, in an SQLite file: committed before the next question is asked.

A question is written down before it is sent, and struck out in the transaction that keeps its reply. What is left of
these after a kill, a dropped connection or a time-out may have been paid for, and counts against the cap on spending.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.errors import InputError
from fourbit.evaluate.database import explained

__all__ = ["Reply", "Store"]

_APPLICATION = 0x34624A31  # "4bJ1", by which SQLite files are told apart
_TABLES = """
CREATE TABLE replies (
    key TEXT PRIMARY KEY, judge TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, counted INTEGER NOT NULL,
    seconds REAL NOT NULL, answered_at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE sent (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
);
"""
_AT_ONCE = 500
"""Parameters of a query; SQLite takes 999 at least."""


@dataclass(frozen=True)
class Reply:
    """What the judge wrote, raw, and what it cost.

    Attributes:
        text: the reply.
        finish_reason: as the server says: stop, length.
        prompt_tokens, completion_tokens: as the server counted them, or, where it did not, the most they can be.
        counted: whether the server counted.
        seconds: from the question to the reply.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    counted: bool
    seconds: float


class Store:
    """The replies in one file, for one process at a time. Use it in a `with` block.

    Args:
        path: of the file; it is made where it does not exist.
        read_only: look only; a file that does not exist is an empty one.

    Raises:
        InputError: the file is another program's, damaged, in use, or cannot be written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._made = not path.exists()
        with self._explained():
            self._connection = self._open(read_only)
            try:
                self._check(read_only)
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        empty = self._made and not any(
            self._connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("replies", "sent")
        )
        self._connection.close()
        if empty:  # no file is left of a run that came to nothing
            self.path.unlink(missing_ok=True)

    def replies(self, keys: Iterable[str]) -> dict[str, Reply]:
        """Those of the keys that were answered."""
        found: dict[str, Reply] = {}
        for chunk in _chunks(keys):
            rows = self._select(
                "SELECT key, text, finish_reason, prompt_tokens, completion_tokens, counted, seconds FROM replies",
                chunk,
            )
            found |= {row[0]: Reply(row[1], row[2], row[3], row[4], bool(row[5]), row[6]) for row in rows}
        return found

    def uncertain(self, keys: Iterable[str]) -> list[tuple[int, int]]:
        """Prompt and completion tokens, at the most, of questions that were sent and whose reply never came."""
        return [
            (row[0], row[1])
            for chunk in _chunks(keys)
            for row in self._select("SELECT prompt_tokens, completion_tokens FROM sent", chunk)
        ]

    def send(self, key: str, prompt_tokens: int, completion_tokens: int) -> int:
        """Write down that a question is about to be sent, and the most it can cost; returns the number of this."""
        with self._explained(), self._connection:
            cursor = self._connection.execute(
                "INSERT INTO sent (key, prompt_tokens, completion_tokens) VALUES (?, ?, ?)",
                (key, prompt_tokens, completion_tokens),
            )
            return int(cursor.lastrowid or 0)

    def strike(self, number: int) -> None:
        """A question cost nothing: it did not reach the server, or the server refused it."""
        with self._explained(), self._connection:
            self._connection.execute("DELETE FROM sent WHERE number = ?", (number,))

    def keep(self, number: int, key: str, judge: str, reply: Reply) -> None:
        """Keep a reply; it is on the disk when this returns."""
        with self._explained(), self._connection:
            self._connection.execute("DELETE FROM sent WHERE number = ?", (number,))
            self._connection.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    key,
                    judge,
                    reply.text.encode("utf-8", "replace").decode(),  # half a surrogate pair is no text for SQLite
                    reply.finish_reason,
                    reply.prompt_tokens,
                    reply.completion_tokens,
                    reply.counted,
                    reply.seconds,
                    time.time(),
                ),
            )

    def _open(self, read_only: bool) -> sqlite3.Connection:
        if not read_only:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return sqlite3.connect(self.path, timeout=1.0)
        if not self.path.exists():
            return sqlite3.connect(":memory:")
        return sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=1.0)

    def _check(self, read_only: bool) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")  # the file is ours until it is closed, or the process ends
        known = run("PRAGMA application_id").fetchone()[0]
        tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if known != _APPLICATION and tables:
            raise InputError(f"{self.path} is a database of another program; choose another cache.")
        if read_only and self.path.exists():
            if not tables:  # killed before anything was in it
                self._connection.close()
                self._connection = sqlite3.connect(":memory:")
            else:
                return
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")  # on the disk, not only on its way
        run("BEGIN EXCLUSIVE")
        if not run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            run(f"PRAGMA application_id = {_APPLICATION}")
            for statement in _TABLES.split(";")[:-1]:
                run(statement)
        run("COMMIT")

    def _select(self, query: str, keys: list[str]) -> list[Any]:
        with self._explained():
            marks = ", ".join("?" * len(keys))
            return self._connection.execute(f"{query} WHERE key IN ({marks})", keys).fetchall()

    def _explained(self) -> AbstractContextManager[None]:
        return explained("cache", self.path, program="fourbit judge", option="--cache")


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    distinct = list(dict.fromkeys(keys))
    for start in range(0, len(distinct), _AT_ONCE):
        yield distinct[start : start + _AT_ONCE]
