"""The votes: one on a pair, in the order that was drawn, whoever writes at the same time."""

from __future__ import annotations

import random
import sqlite3
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fourbit.errors import InputError
from fourbit.evaluate.arena.ballots import AlreadyVoted, NotYours, Progress, Showing
from fourbit.evaluate.arena.pairs import Pair, PairSet
from fourbit.evaluate.arena.store import RESERVED_S, Store

Make = Callable[..., Store]


def vote_all(store: Store, rater: str, *, most: int = 1000, raters_per_pair: int | None = None) -> list[Showing]:
    seen: list[Showing] = []
    while len(seen) < most and (showing := store.next(rater, raters_per_pair=raters_per_pair)) is not None:
        store.vote(rater, showing.ticket, "A")
        seen.append(showing)
    return seen


def test_a_rater_sees_every_pair_once_and_comes_back_to_the_same(arena: Make) -> None:
    store = arena(prompts=4, systems="abc")
    first = store.next("anna")
    assert first is not None
    assert store.next("anna") == first  # the browser was closed
    assert store.progress("anna") == Progress(0, 12)
    seen = vote_all(store, "anna")
    assert seen[0] == first
    assert len({showing.ticket for showing in seen}) == len(seen) == 12
    assert store.next("anna") is None
    assert store.progress("anna") == Progress(12, 0)
    assert store.progress("ben") == Progress(0, 12)
    assert Counter(frozenset(vote.systems) for vote in store.votes()) == {
        frozenset(two): 4 for two in ("ab", "ac", "bc")
    }


def test_nothing_of_a_showing_names_a_system(tmp_path: Path) -> None:
    with Store(tmp_path / "v.sqlite", make=True) as store:
        store.settle(PairSet(("ours", "theirs"), (Pair("p", "q", ("ours", "theirs"), ("x", "y")),)))
        store.add_raters(["anna"])
        showing = store.next("anna")
        assert showing is not None
        store.vote("anna", showing.ticket, "B")
        for shown in (showing, store.last("anna")):
            assert "ours" not in repr(shown)
            assert "theirs" not in repr(shown)


def test_the_order_is_drawn_for_each_rater_and_pair_and_kept(arena: Make) -> None:
    store = arena(prompts=60)
    for rater in ("anna", "ben"):
        vote_all(store, rater)
    swapped = {rater: [vote.swapped for vote in store.votes() if vote.rater == rater] for rater in ("anna", "ben")}
    # 60 fair coins: 12 heads or fewer, or as many tails, come once in a million times (two-sided binomial)
    assert all(12 < sum(orders) < 48 for orders in swapped.values())
    assert swapped["anna"] != swapped["ben"]
    for vote in store.votes():
        assert vote.systems == (("b", "a") if vote.swapped else ("a", "b"))
        assert vote.characters == (len(f"a says {vote.prompt}"),) * 2


def test_raters_who_stop_half_way_have_the_same_half(arena: Make) -> None:
    store = arena(prompts=10)
    questions = [{showing.question for showing in vote_all(store, rater, most=5)} for rater in ("anna", "ben")]
    assert questions[0] == questions[1]


def test_so_many_raters_for_each_pair(arena: Make) -> None:
    store = arena("a b c d e", prompts=10)
    for _ in range(10):
        for rater in "abcde":
            vote_all(store, rater, most=1, raters_per_pair=2)
    counts = Counter(vote.prompt for vote in store.votes())
    assert set(counts.values()) == {2}
    assert len(counts) == 10
    assert {store.progress(rater, raters_per_pair=2).left for rater in "abcde"} == {0}


def test_a_pair_that_is_being_looked_at_counts_for_a_while(tmp_path: Path, pair_set: Callable[..., PairSet]) -> None:
    now = [0.0]
    with Store(tmp_path / "v.sqlite", make=True, clock=lambda: now[0]) as store:
        store.settle(pair_set(prompts=1))
        store.add_raters(["anna", "ben"])
        opened = store.next("anna", raters_per_pair=1)
        assert opened is not None
        assert store.next("ben", raters_per_pair=1) is None
        now[0] += RESERVED_S + 1
        assert store.next("ben", raters_per_pair=1) is not None
        store.vote("anna", opened.ticket, "tie")  # who comes back late is heard all the same


def test_one_vote_on_a_pair(arena: Make) -> None:
    store = arena()
    showing = store.next("anna")
    assert showing is not None
    for rater, ticket in (("ben", showing.ticket), ("anna", "nothing"), ("anna", "")):
        with pytest.raises(NotYours):
            store.vote(rater, ticket, "A")
    store.vote("anna", showing.ticket, "A")
    with pytest.raises(AlreadyVoted) as caught:
        store.vote("anna", showing.ticket, "B")
    assert caught.value.choice == "A"
    assert [vote.choice for vote in store.votes()] == ["A"]
    with sqlite3.connect(store.path) as other, pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        other.execute("INSERT INTO votes (ticket, choice, voted_at) VALUES (?, 'B', 0)", (showing.ticket,))
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        other.execute("INSERT INTO shown SELECT 'another', rater, pair, swapped, shown_at FROM shown")
    other.close()


def test_the_last_vote_can_be_corrected_and_no_other(arena: Make) -> None:
    store = arena()
    first, second = vote_all(store, "anna", most=2)
    with pytest.raises(AlreadyVoted):
        store.correct("anna", first.ticket, "B")
    with pytest.raises(NotYours):
        store.correct("ben", second.ticket, "B")
    last = store.last("anna")
    assert last is not None
    assert (last.ticket, last.choice) == (second.ticket, "A")
    before = store.state
    store.correct("anna", second.ticket, "A")  # the same again changes nothing
    assert store.state == before
    store.correct("anna", second.ticket, "both bad")
    store.correct("anna", second.ticket, "tie")
    assert [(vote.choice, vote.corrections) for vote in store.votes()] == [("A", 0), ("tie", 2)]
    assert store.state != before
    opened = store.next("anna")
    assert opened is not None
    with pytest.raises(AlreadyVoted):  # which has no vote yet that could be corrected, but is not the last one either
        store.correct("anna", first.ticket, "B")
    with pytest.raises(NotYours):
        store.correct("anna", opened.ticket, "B")


def test_a_race_has_one_winner(arena: Make) -> None:
    """Many threads vote on the same pairs at once; each pair gets one vote, and everybody else is told."""
    store = arena(prompts=12)
    won: list[str] = []
    lost: list[str] = []

    def run(choice: str) -> None:
        while (showing := store.next("anna")) is not None:
            try:
                store.vote("anna", showing.ticket, choice)  # type: ignore[arg-type]
                won.append(showing.ticket)
            except AlreadyVoted:
                lost.append(showing.ticket)

    threads = [threading.Thread(target=run, args=(choice,)) for choice in ("A", "B", "tie", "both bad")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(set(won)) == store.vote_count == 12
    assert set(lost) <= set(won)


WRITER = """
import sys
from pathlib import Path
from fourbit.evaluate.arena.ballots import AlreadyVoted
from fourbit.evaluate.arena.store import Store

won = 0
with Store(Path(sys.argv[1])) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    while (showing := store.next(sys.argv[2])) is not None:
        try:
            store.vote(sys.argv[2], showing.ticket, "A")
            won += 1
        except AlreadyVoted:
            pass
print(won)
"""


def test_processes_write_at_once(arena: Make) -> None:
    """Two processes for the same rater, and one for another: no vote is lost, and none counts twice."""
    store = arena(prompts=40)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.path), rater],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rater in ("anna", "anna", "ben")
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    won = [int(writer.communicate("go\n", timeout=60)[0]) for writer in writers]
    assert won[0] + won[1] == won[2] == 40
    assert store.vote_count == 80


def test_a_full_disk_costs_nothing_that_was_saved(arena: Make) -> None:
    store = arena(prompts=200)
    saved = vote_all(store, "anna", most=3)
    pages = store._run("PRAGMA page_count").fetchone()[0]
    store._run(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(InputError, match="the disk is full"):
        vote_all(store, "anna")
    assert store.vote_count >= len(saved)
    count = store.vote_count
    store._run(f"PRAGMA max_page_count = {10 * pages}")
    assert len(vote_all(store, "anna")) == 200 - count


def test_tokens(arena: Make) -> None:
    store = arena()
    tokens = store.raters
    assert list(tokens) == ["anna", "ben"]
    assert len({*tokens.values(), store.organiser}) == 3
    assert min(map(len, (*tokens.values(), store.organiser))) >= 32
    assert store.rater_of(tokens["ben"]) == "ben"
    for wrong in ("", "x", tokens["ben"][:-1], tokens["ben"] + "x", store.organiser, "ü", "\ud800"):
        assert store.rater_of(wrong) is None
    assert store.is_organiser(store.organiser)
    assert not store.is_organiser(tokens["anna"])
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    store.add_raters(["ben", "carl"])
    assert store.raters["ben"] == tokens["ben"]
    store.add_raters([], new_links=True)
    assert set(store.raters) == {"anna", "ben", "carl"}
    assert store.rater_of(tokens["ben"]) is None


def test_the_same_file_goes_on_with_the_same_answers_only(
    arena: Make, pair_set: Callable[..., PairSet], tmp_path: Path
) -> None:
    store = arena(systems="abc")
    store.settle(pair_set("abc"), chance=random.Random(9))
    with pytest.raises(InputError, match=r"a, b, c, and not on a, b;"):
        store.settle(pair_set("ab"))
    with pytest.raises(InputError, match="other answers or prompts"):
        store.check(pair_set("abc", prompts=5))
    with pytest.raises(InputError, match="and not on answers of running models"):
        store.check(PairSet(("a", "b", "c"), live=True))


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 2000])
def test_a_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "votes.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"votes\.sqlite"):
        Store(path)
    assert path.read_bytes() == content


def test_databases_of_others(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE votes (id)")
    connection.close()
    for make in (False, True):
        with pytest.raises(InputError, match="holds no votes of fourbit arena"):
            Store(path, make=make)
    with pytest.raises(InputError, match="does not exist"):
        Store(tmp_path / "none.sqlite")
    with pytest.raises(InputError, match="is no file"):
        Store(tmp_path, make=True)


def test_answers_made_while_people_ask(tmp_path: Path) -> None:
    with Store(tmp_path / "v.sqlite", make=True) as store:
        store.settle(PairSet(("a", "b"), live=True))
        store.add_raters(["anna", "ben"])
        assert store.live
        assert store.next("anna") is None
        showing = store.put("anna", Pair("live-1", "q", ("a", "b"), ("x", "y")))
        assert store.put("anna", Pair("live-2", "again", ("a", "b"), ("x", "y"))) == showing  # one after the other
        assert store.next("anna") == showing
        assert store.next("ben") is None
        assert store.progress("anna") == Progress(0, 1)
        store.vote("anna", showing.ticket, "A")
        assert store.progress("anna") == Progress(1, 0)
        assert store.pairs_by_systems() == {("a", "b"): 1}
