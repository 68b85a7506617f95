"""The arena at the wire: nothing lost, nothing told, nothing taken from strangers."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fourbit.evaluate.arena.store import Store

NAMES = ("guanaco-33b", "zebra-7b")


@pytest.fixture(scope="module")
def arena(
    start: Callable[..., Any], answers: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("arena")
    files = answers(folder, *NAMES, prompts=12)
    found = start(*files, "--votes", "votes.sqlite", "--raters", "anna,ben,carl", folder=folder)
    found.path = folder / "votes.sqlite"
    return found


def test_no_vote_is_lost_when_it_is_killed(
    start: Callable[..., Any],
    answers: Callable[..., list[Path]],
    fourbit_here: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """kill -9 right after the answer to a vote, twice; the links go on, and elo and agreement read the export."""
    files = answers(tmp_path, *NAMES, prompts=9)
    tickets, links = [], []
    for run in range(2):
        arena = start(*(files if run == 0 else []), "--votes", "votes.sqlite", "--raters", "anna,ben", folder=tmp_path)
        links.append({name: arena.token(name) for name in ("anna", "ben")})
        opened = arena.ask("/api/next", arena.token("anna")).json["pair"]["ticket"]
        tickets += [arena.vote(rater, choice) for rater in ("anna", "ben") for choice in ("A", "tie", "B")]
        assert opened in tickets
        waiting = arena.ask("/api/next", arena.token("ben")).json["pair"] if run < 1 else None
        arena.kill()
        with Store(tmp_path / "votes.sqlite") as store:
            assert store.vote_count == len(tickets) == 6 * (run + 1)
            if waiting is not None:
                showing = store.next("ben")
                assert showing is not None
                assert showing.ticket == waiting["ticket"]
    assert links[0] == links[1]
    assert len(set(tickets)) == 12

    done = fourbit_here("arena", "--votes", "votes.sqlite", "--export", "ratings.jsonl", "--json")
    assert json.loads(done.out) == {"votes": "votes.sqlite", "output": "ratings.jsonl", "ratings": 12, "raters": 2}
    ranked = json.loads(fourbit_here("elo", "ratings.jsonl", "--orderings", "50", "--samples", "20", "--json").out)
    assert {row["model"] for row in ranked["ratings"]} == set(NAMES)
    assert (ranked["matches"], ranked["prompts"]) == (12, 6)
    agreed = json.loads(fourbit_here("agreement", "ratings.jsonl", "--samples", "20", "--json").out)
    assert [rater["rater"] for rater in agreed["raters"]] == ["anna", "ben"]
    assert agreed["fleiss"]["count"] == 6


def test_a_rater_is_never_told_whose_answers_these_are(arena: Any) -> None:
    token = arena.token("carl")
    said = [arena.ask(f"/rate/{token}"), *(arena.ask(f"/{name}") for name in ("rate.js", "arena.css"))]
    for number in range(12):
        said.append(arena.ask("/api/next", token))
        ticket = said[-1].json["pair"]["ticket"]
        said.append(arena.ask("/api/vote", token, {"ticket": ticket, "choice": ("A", "B", "tie")[number % 3]}))
        said.append(arena.ask("/api/vote", token, {"ticket": ticket, "choice": "both bad"}))
        assert [reply.status for reply in said[-3:]] == [200, 200, 409]
        said.append(arena.ask("/api/last", token))
    said.append(arena.ask("/api/next", token))
    assert said[-1].json["state"] == "done"
    for path in ("/api/survey", "/api/votes.jsonl"):
        said.append(arena.ask(path, token))
        assert said[-1].status == 401
    for reply in said:
        whole = reply.body + json.dumps(reply.headers).encode()
        assert not any(name.encode() in whole for name in NAMES)
        assert b"votes.sqlite" not in whole


def test_many_votes_on_one_pair_at_once(arena: Any) -> None:
    """Twelve requests at the same moment: one vote, and whoever asked for another is told which stands."""
    token = arena.token("ben")
    ticket = arena.ask("/api/next", token).json["pair"]["ticket"]
    wanted = ["A", "B", "tie", "both bad"] * 3
    found: list[tuple[str, Any]] = []
    together = threading.Barrier(len(wanted))

    def send(choice: str) -> None:
        together.wait()
        found.append((choice, arena.ask("/api/vote", token, {"ticket": ticket, "choice": choice})))

    threads = [threading.Thread(target=send, args=(choice,)) for choice in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (stands,) = {choice for choice, reply in found if reply.status == 200}
    assert Counter(reply.status for _, reply in found) == {200: 3, 409: 9}
    assert {reply.json["choice"] for _, reply in found if reply.status == 409} == {stands}
    with Store(arena.path) as store:
        assert [vote.choice for vote in store.votes() if vote.rater == "ben"] == [stands]


def test_strangers_get_nothing(arena: Any) -> None:
    anna, organiser = arena.token("anna"), arena.keys["organiser"].rpartition("/")[2]
    ticket = arena.ask("/api/next", anna).json["pair"]["ticket"]
    ballot = {"ticket": ticket, "choice": "A"}
    for token in (None, "", "x", anna[:-1], anna + "x", organiser, "ü".encode().decode("latin-1")):
        for path, body in (
            ("/api/next", None),
            ("/api/last", None),
            ("/api/vote", ballot),
            ("/api/ask", {"prompt": "x"}),
        ):
            assert arena.ask(path, token, body).status == 401
    for token in (None, anna):
        assert {arena.ask(path, token).status for path in ("/api/survey", "/api/votes.jsonl")} == {401}
    assert arena.ask("/api/survey", organiser).status == 200
    # what another page in the rater's browser could send: no header of its choice, a form, a cookie, the address
    for headers in ({"Cookie": f"token={anna}"}, {"Content-Type": "text/plain"}, {"Origin": "http://evil.example"}):
        assert arena.ask("/api/vote", None, ballot, headers).status == 401
    assert arena.ask(f"/api/next?token={anna}").status == 401
    # nobody votes with somebody else's ticket
    assert arena.ask("/api/vote", arena.token("carl"), ballot).status == 404
    for path in (f"/rate/{organiser}", f"/organise/{anna}", "/rate/x", "/organise/x"):
        reply = arena.ask(path)
        assert reply.status == 403
        assert b"This link is not known here" in reply.body
    with Store(arena.path) as store:
        assert not [vote for vote in store.votes() if vote.rater == "anna"]


def test_what_is_no_request(arena: Any) -> None:
    token = arena.token("anna")
    ticket = arena.ask("/api/next", token).json["pair"]["ticket"]
    for body in (
        b"",
        b"{",
        b"[]",
        b"\xff",
        {},
        {"ticket": ticket},
        {"ticket": ticket, "choice": "C"},
        {"ticket": 7, "choice": "A"},
    ):
        reply = arena.ask("/api/vote", token, body)
        assert reply.status in (400, 422)
        assert list(reply.json) == ["error"]
    assert arena.ask("/api/vote", token, {"ticket": "x" * 60, "choice": "A"}).status == 404
    assert arena.ask("/api/ask", token, {"prompt": "hello"}).status == 404  # nothing runs here
    assert arena.ask("/api/vote", token, b"x" * 200_000).status == 413
    for path in (
        "/",
        "/rate",
        "/rate/",
        "/pages/rate.html",
        "/rate.html",
        "/..%2f..%2fpyproject.toml",
        "/%2e%2e/run.py",
        "/docs",
    ):
        assert arena.ask(path).status == 404, path
    assert arena.ask("/api/none", token).json == {"error": "Not Found"}


def test_every_answer_carries_the_policy(arena: Any) -> None:
    token = arena.token("anna")
    replies = [arena.ask(path, token) for path in ("/rate/x", f"/rate/{token}", "/rate.js", "/api/next", "/none")]
    replies.append(arena.ask("/api/vote", token, b"x" * 200_000))
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        assert "set-cookie" not in reply.headers
        assert "access-control-allow-origin" not in reply.headers


def test_broken_clients_do_not_stop_it(arena: Any) -> None:
    address = urlsplit(arena.keys["organiser"])
    open_ = []
    for sent in (
        b"",
        b"GET / HT",
        b"\x16\x03\x01 no HTTP at all\r\n\r\n",
        b"POST /api/vote HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"POST /api/vote HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nx",
    ):
        connection = socket.create_connection((address.hostname, address.port), timeout=5)
        connection.sendall(sent)
        open_.append(connection)
    assert arena.ask("/api/next", arena.token("anna")).status == 200
    for connection in open_:
        connection.close()
    assert arena.ask("/api/next", arena.token("anna")).status == 200


def test_a_port_that_is_taken(
    arena: Any, answers: Callable[..., list[Path]], fourbit_here: Callable[..., Any], tmp_path: Path
) -> None:
    port = str(urlsplit(arena.keys["organiser"]).port)
    files = answers(tmp_path, *NAMES)
    refused = fourbit_here("arena", *files, "--votes", "other.sqlite", "--raters", "anna", "--port", port)
    assert f"Port {port} of 127.0.0.1 is taken" in refused.complaint
    assert not (tmp_path / "other.sqlite").exists()
