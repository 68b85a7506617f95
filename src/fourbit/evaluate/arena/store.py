"""Every pair, every rater and every vote, in an SQLite file: a vote is on the disk before its rater sees the next pair.

What a rater is shown is written down before it is sent, with the order that was drawn for it; so whoever closes the
browser comes back to the same pair in the same order. That a rater has one vote on a pair is not a matter of care:
the tables hold a rater and a pair once, and a vote on that once (schema.py).
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from fourbit.errors import InputError
from fourbit.evaluate.arena.ballots import AlreadyVoted, Choice, NotYours, Progress, Showing, Vote
from fourbit.evaluate.arena.pairs import Pair, PairSet, in_turn
from fourbit.evaluate.arena.schema import APPLICATION, TABLES
from fourbit.evaluate.database import explained

__all__ = ["Store"]

RESERVED_S = 1800.0
"""How long a pair that was shown and not voted on counts as one that will be."""


class Store:
    """The votes in one file. Use it in a `with` block; threads may share it, and processes may open the same file.

    Args:
        path: of the file.
        make: make it where it does not exist; only its owner may read it, as it holds the raters' tokens.
        clock, draw_order: the time, and whether a pair is shown with its second answer first.

    Raises:
        InputError: the file is not there, another program's, damaged, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        make: bool = False,
        clock: Callable[[], float] = time.time,
        draw_order: Callable[[], bool] = lambda: bool(secrets.randbelow(2)),
    ) -> None:
        self.path = path
        self._clock, self._draw_order = clock, draw_order
        self._lock = threading.RLock()
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        if not path.is_file():
            raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}; --votes names the votes.")
        with self._explained():
            self._connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode=rw",
                uri=True,
                timeout=10.0,
                isolation_level=None,
                check_same_thread=False,
            )
            try:
                self._prepare(make)
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    # what is compared, and by whom

    @property
    def is_new(self) -> bool:
        """Whether nothing has been settled yet."""
        return self._fact("fingerprint") is None

    @property
    def live(self) -> bool:
        """Whether raters ask, and models answer them."""
        return self._fact("live") == "1"

    @property
    def systems(self) -> tuple[str, ...]:
        """The names of what is compared."""
        return tuple(json.loads(self._fact("systems") or "[]"))

    def settle(self, given: PairSet, *, chance: Any = None) -> None:
        """Write down what is compared, or make sure that it is what was compared before.

        Args:
            chance: the `random.Random` that shuffles; the system's by default.

        Raises:
            InputError: the file has votes on something else.
        """
        with self._transaction():
            if self.is_new:
                facts = {"systems": json.dumps(given.systems), "live": str(int(given.live)), "organiser": _token()}
                for name, value in (facts | {"fingerprint": given.fingerprint}).items():
                    self._run("INSERT INTO facts VALUES (?, ?)", name, value)
                for pair in in_turn(given.pairs, chance=chance or secrets.SystemRandom()):
                    self._insert(pair)
            else:
                self.check(given)

    def check(self, given: PairSet) -> None:
        """Refuse what is not compared in this file.

        Raises:
            InputError: says what differs.
        """
        if self._fact("fingerprint") == given.fingerprint:
            return
        choose = "give the same answers, or choose another file with --votes"
        if given.live != self.live:
            kinds = ("answers out of files", "answers of running models")
            raise InputError(f"{self.path} has votes on {kinds[self.live]}, and not on {kinds[given.live]}; {choose}.")
        if sorted(given.systems) != sorted(self.systems):
            raise InputError(
                f"{self.path} has votes on {', '.join(self.systems)}, and not on {', '.join(given.systems)}; {choose}."
            )
        raise InputError(f"{self.path} has votes on other answers or prompts of {', '.join(self.systems)}; {choose}.")

    def add_raters(self, names: Sequence[str], *, new_links: bool = False) -> None:
        """Give raters who are not known yet a token; `new_links` gives all, the organiser too, another one."""
        with self._transaction():
            for name in names:
                self._run("INSERT OR IGNORE INTO raters VALUES (?, ?)", name, _token())
            if new_links:
                for name in self.raters:
                    self._run("UPDATE raters SET token = ? WHERE name = ?", _token(), name)
                self._run("UPDATE facts SET value = ? WHERE name = 'organiser'", _token())

    @property
    def raters(self) -> dict[str, str]:
        """Name to token, in the order of the alphabet."""
        return dict(self._rows("SELECT name, token FROM raters ORDER BY name"))

    @property
    def organiser(self) -> str:
        """The organiser's token."""
        return self._fact("organiser") or ""

    def rater_of(self, token: str) -> str | None:
        """Whose token it is; takes as long for a wrong one as for any other."""
        found = None
        for name, known in self.raters.items():
            if secrets.compare_digest(known.encode(), token.encode("utf-8", "replace")):
                found = name
        return found

    def is_organiser(self, token: str) -> bool:
        """Whether it is the organiser's token."""
        return secrets.compare_digest(self.organiser.encode(), token.encode("utf-8", "replace"))

    # what a rater does

    def next(self, rater: str, *, raters_per_pair: int | None = None) -> Showing | None:
        """What the rater sees now: what was shown and not voted on, or else the first pair whose turn it is.

        Every rater takes the pairs in the same turn, so that raters who stop half-way have the same half.

        Args:
            raters_per_pair: leave out pairs that so many raters have voted on, or are about to. None: all raters.

        Returns:
            None: nothing is left.
        """
        with self._transaction():
            if (open_ := self._open(rater)) is not None:
                return open_
            rows = self._rows(
                f"SELECT number FROM pairs WHERE {_FREE} ORDER BY number LIMIT 1", *self._free(rater, raters_per_pair)
            )
            return None if not rows or self.live else self._show(rater, int(rows[0][0]))

    def put(self, rater: str, pair: Pair) -> Showing:
        """Show the rater a new pair: the answers to what the rater has asked."""
        with self._transaction():
            return self._open(rater) or self._show(rater, self._insert(pair))

    def vote(self, rater: str, ticket: str, choice: Choice) -> None:
        """Take a vote; it is on the disk when this returns.

        Raises:
            AlreadyVoted: the rater has voted on it. NotYours: it was never shown to the rater.
        """
        with self._transaction():
            self._of(rater, ticket)
            try:
                self._run(
                    "INSERT INTO votes (ticket, choice, voted_at) VALUES (?, ?, ?)", ticket, choice, self._clock()
                )
            except sqlite3.IntegrityError:
                raise AlreadyVoted(self._choice(ticket)) from None

    def correct(self, rater: str, ticket: str, choice: Choice) -> None:
        """Replace the rater's last vote. The one before stays on record, and counts no more.

        Raises:
            AlreadyVoted: it is not the last one, which alone can be corrected. NotYours: as for `vote`.
        """
        with self._transaction():
            self._of(rater, ticket)
            last = self.last(rater)
            if last is None or last.ticket != ticket:
                raise AlreadyVoted(self._choice(ticket))
            if last.choice == choice:
                return
            self._run(
                "INSERT INTO corrected SELECT ticket, choice, voted_at, ? FROM votes WHERE ticket = ?",
                self._clock(),
                ticket,
            )
            self._run("UPDATE votes SET choice = ?, voted_at = ? WHERE ticket = ?", choice, self._clock(), ticket)

    def last(self, rater: str) -> Showing | None:
        """What the rater voted on last, with the vote."""
        return self._showing("rater = ? AND choice IS NOT NULL ORDER BY votes.number DESC", rater)

    def progress(self, rater: str, *, raters_per_pair: int | None = None) -> Progress:
        """How far a rater is; what is shown and not voted on is left."""
        with self._lock, self._explained():
            done, opened = self._rows(
                "SELECT count(choice), count(*) - count(choice) FROM shown LEFT JOIN votes USING (ticket)"
                " WHERE rater = ?",
                rater,
            )[0]
            free = self._rows(f"SELECT count(*) FROM pairs WHERE {_FREE}", *self._free(rater, raters_per_pair))
            return Progress(done, opened + (0 if self.live else free[0][0]))

    # what came of it

    def pairs_by_systems(self) -> dict[tuple[str, str], int]:
        """How many pairs there are of each two systems."""
        rows = self._rows("SELECT one, other, count(*) FROM compared GROUP BY one, other")
        return {(one, other): count for one, other, count in rows}

    @property
    def prompt_count(self) -> int:
        """How many prompts there are."""
        return int(self._rows("SELECT count(*) FROM prompts")[0][0])

    @property
    def vote_count(self) -> int:
        """How many votes stand."""
        return int(self._rows("SELECT count(*) FROM votes")[0][0])

    @property
    def state(self) -> tuple[int, int]:
        """Something that changes with every vote and every correction."""
        return self.vote_count, int(self._rows("SELECT count(*) FROM corrected")[0][0])

    def votes(self) -> list[Vote]:
        """Every vote that stands, in the order in which they came."""
        rows = self._rows(
            "SELECT rater, prompt, one, other, swapped, length(one_answer), length(other_answer), choice,"
            " voted_at - shown_at, voted_at, (SELECT count(*) FROM corrected WHERE corrected.ticket = votes.ticket)"
            " FROM votes JOIN shown USING (ticket) JOIN compared USING (pair) ORDER BY votes.number"
        )
        return [
            Vote(rater, json.loads(prompt), *_turned(bool(swapped), (one, other), (first, second)), choice, *rest)
            for rater, prompt, one, other, swapped, first, second, choice, *rest in rows
        ]

    def _show(self, rater: str, pair: int) -> Showing:
        ticket = secrets.token_urlsafe(9)
        self._run("INSERT INTO shown VALUES (?, ?, ?, ?, ?)", ticket, rater, pair, self._draw_order(), self._clock())
        return self._of(rater, ticket)

    def _open(self, rater: str) -> Showing | None:
        return self._showing("rater = ? AND choice IS NULL", rater)

    def _of(self, rater: str, ticket: str) -> Showing:
        found = self._showing("rater = ? AND shown.ticket = ?", rater, ticket)
        if found is None:
            raise NotYours
        return found

    def _showing(self, where: str, *values: Any) -> Showing | None:
        rows = self._rows(
            "SELECT shown.ticket, question, swapped, one_answer, other_answer, choice FROM shown"
            f" JOIN compared USING (pair) LEFT JOIN votes USING (ticket) WHERE {where} LIMIT 1",
            *values,
        )
        if not rows:
            return None
        ticket, question, swapped, one, other, choice = rows[0]
        return Showing(ticket, question, *((other, one) if swapped else (one, other)), choice)

    def _choice(self, ticket: str) -> Choice:
        rows = self._rows("SELECT choice FROM votes WHERE ticket = ?", ticket)
        if not rows:
            raise NotYours
        choice: Choice = rows[0][0]
        return choice

    def _free(self, rater: str, raters_per_pair: int | None) -> tuple[Any, ...]:
        return rater, raters_per_pair, self._clock() - RESERVED_S, raters_per_pair

    def _insert(self, pair: Pair) -> int:
        name = json.dumps(pair.prompt)
        self._run("INSERT OR IGNORE INTO prompts (id, question) VALUES (?, ?)", name, pair.question)
        prompt = self._run("SELECT number FROM prompts WHERE id = ?", name).fetchone()[0]
        numbers = []
        for system, text in zip(pair.systems, pair.answers, strict=True):
            self._run("INSERT OR IGNORE INTO answers (prompt, system, text) VALUES (?, ?, ?)", prompt, system, text)
            found = self._run("SELECT number FROM answers WHERE prompt = ? AND system = ?", prompt, system).fetchone()
            numbers.append(found[0])
        return int(self._run("INSERT INTO pairs (one, other) VALUES (?, ?)", *numbers).lastrowid or 0)

    def _fact(self, name: str) -> str | None:
        rows = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

    def _prepare(self, make: bool) -> None:
        known = self._run("PRAGMA application_id").fetchone()[0]
        tables = self._run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if known != APPLICATION and (tables or not make):
            raise InputError(f"{self.path} holds no votes of fourbit arena; choose another file with --votes.")
        self._run("PRAGMA foreign_keys = ON")
        self._run("PRAGMA synchronous = FULL")  # on the disk, not only on its way
        if tables or not make:
            return
        self._run("PRAGMA journal_mode = WAL")
        with self._transaction():
            if not self._run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                self._run(f"PRAGMA application_id = {APPLICATION}")
                for statement in TABLES.split(";")[:-1]:
                    self._run(statement)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, with nobody else writing meanwhile."""
        with self._lock, self._explained():
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has ended it already
                    self._run("ROLLBACK")
                raise

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock, self._explained():
            return self._run(query, *values).fetchall()

    def _explained(self) -> AbstractContextManager[None]:
        return explained("database", self.path, program="fourbit arena", option="--votes")


_FREE = """NOT EXISTS (SELECT 1 FROM shown WHERE rater = ? AND pair = pairs.number) AND (? IS NULL OR (
    SELECT count(*) FROM shown LEFT JOIN votes USING (ticket)
    WHERE pair = pairs.number AND (choice IS NOT NULL OR shown_at > ?)) < ?)"""


def _token() -> str:
    return secrets.token_urlsafe(24)


def _turned(
    swapped: bool, systems: tuple[str, str], characters: tuple[int, int]
) -> tuple[tuple[str, str], bool, tuple[int, int]]:
    return (systems[::-1], True, characters[::-1]) if swapped else (systems, False, characters)
