"""What a person may get wrong with the arena: one sentence, exit code 2, and nothing written."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourbit.evaluate.arena.store import Store

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Answers of all kinds."""

    def write(name: str, records: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("a.jsonl", [{"id": n, "prompt": f"q{n}", "text": f"a{n}"} for n in range(4)])
    write("b.jsonl", [{"id": n, "prompt": f"q{n}", "text": f"b{n}"} for n in range(4)])
    write("fewer.jsonl", [{"id": n, "prompt": f"q{n}", "text": f"c{n}"} for n in range(3)])
    write("others.jsonl", [{"id": f"x{n}", "prompt": f"q{n}", "text": f"c{n}"} for n in range(4)])
    write("differ.jsonl", [{"id": n, "prompt": f"other {n}", "text": f"c{n}"} for n in range(4)])
    write("bare.jsonl", [{"id": n, "text": f"c{n}"} for n in range(4)])
    write("twice.jsonl", [{"id": 1, "prompt": "q", "text": "c"}] * 2)
    write("textless.jsonl", [{"id": 1, "prompt": "q"}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"id": 1, "prompt": "q", "te')
    (tmp_path / "notes.sqlite").write_text("not a database at all, but long enough to be taken for one\n" * 20)
    connection = sqlite3.connect(tmp_path / "foreign.sqlite")
    connection.execute("CREATE TABLE votes (id)")
    connection.close()
    with Store(tmp_path / "known.sqlite", make=True) as store:
        from fourbit.evaluate.arena.pairs import plan_pairs

        store.settle(plan_pairs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]))
        store.add_raters(["anna"])
    (tmp_path / "model").mkdir()
    return tmp_path


NEW = ["--votes", "new.sqlite", "--raters", "anna"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.jsonl", *NEW], "two systems or more"),
        (["a.jsonl", "none.jsonl", *NEW], "none.jsonl does not exist"),
        (["a.jsonl", "model", *NEW], "model is a folder"),
        (["a.jsonl", "empty.jsonl", *NEW], "empty.jsonl"),
        (["a.jsonl", "torn.jsonl", *NEW], "torn.jsonl, line 1"),
        (["a.jsonl", "twice.jsonl", *NEW], "the id 1 is that of"),
        (["a.jsonl", "textless.jsonl", *NEW], "must have its text"),
        (["a.jsonl", "fewer.jsonl", *NEW], "has no answer to prompt 3"),
        (["a.jsonl", "others.jsonl", *NEW], "has no answer to prompts"),
        (["a.jsonl", "others.jsonl", "--common", *NEW], "no prompt that all systems answer"),
        (["a.jsonl", "differ.jsonl", *NEW], "is not that of"),
        (["bare.jsonl", "x=bare.jsonl", *NEW], "--questions"),
        (["a.jsonl", "a.jsonl", *NEW], "Two systems are called 'a'"),
        (["a.jsonl", "b.jsonl", "--reference", "c", *NEW], "none of the systems"),
        (["a.jsonl", "b.jsonl", "--votes", "new.sqlite"], "name the raters"),
        (["a.jsonl", "b.jsonl", "--votes", "new.sqlite", "--raters", "anna,"], "has the name ''"),
        (["a.jsonl", "b.jsonl", "--votes", "new.sqlite", "--raters", "a/b"], "has the name 'a/b'"),
        (["a.jsonl", "b.jsonl", "--votes", "new.sqlite", "--raters", "ben,anna,ben"], "names ben twice"),
        (["a.jsonl", "b.jsonl", "--raters-per-pair", "0", *NEW], "must be 1 or more"),
        (["a.jsonl", "b.jsonl", "--port", "65536", *NEW], "between 0 and 65535"),
        (["a.jsonl", "b.jsonl", "--host", "no such host", *NEW], "no address"),
        (["a.jsonl", "b.jsonl", "--host", "192.0.2.1", *NEW], "no address of this machine"),
        (["a.jsonl", "b.jsonl", "--url", "arena.example.org", *NEW], "https://arena.example.org"),
        ([*NEW], "new.sqlite does not exist"),
        ([*NEW, "--dry-run"], "new.sqlite does not exist"),
        (["--votes", "foreign.sqlite"], "holds no votes of fourbit arena"),
        (["a.jsonl", "b.jsonl", "--votes", "foreign.sqlite", "--raters", "anna"], "holds no votes of fourbit arena"),
        (["a.jsonl", "b.jsonl", "--votes", "notes.sqlite", "--raters", "anna"], "notes.sqlite is damaged"),
        (["a.jsonl", "b.jsonl", "--votes", "model", "--raters", "anna"], "model is no file"),
        (["a.jsonl", "x=b.jsonl", "--votes", "known.sqlite"], "has votes on a, b, and not on a, x"),
        (["fewer.jsonl", "b.jsonl", "--common", "--votes", "known.sqlite"], "and not on fewer, b"),
        (["a.jsonl", "b=bare.jsonl", "--votes", "known.sqlite", "--dry-run"], "other answers or prompts"),
        (["a.jsonl", "b.jsonl", "--live", "c", *NEW], "leave out one of"),
        (["--live", "model", *NEW], "twice or more"),
        (["--live", "model", "--live", "nowhere", *NEW], "nowhere is no folder"),
        (["--live", "model", "--live", "x=model", *NEW], "model"),
        (["--live", "a", "--live", "b", "--base-url", "localhost:80", *NEW], "base URL"),
        (["--live", "a", "--live", "b", "--base-url", "http://x/v1", "--max-tokens", "0", *NEW], "1 or more"),
        (
            ["--live", "a", "--live", "b", "--base-url", "http://x/v1", "--votes", "known.sqlite"],
            "answers out of files",
        ),
        (["a.jsonl", "b.jsonl", "--base-url", "http://x/v1", *NEW], "--live"),
        (["--questions", "a.jsonl", *NEW], "files of answers"),
        (["--votes", "known.sqlite", "--export", "out.jsonl"], "no votes yet"),
        (["--votes", "new.sqlite", "--export", "out.jsonl"], "new.sqlite does not exist"),
        (["--votes", "known.sqlite", "--export", "known.sqlite"], "over the votes themselves"),
        (["a.jsonl", "b.jsonl", "--votes", "known.sqlite", "--export", "out.jsonl"], "leave out what is for voting"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_sentence(folder: Path, fourbit_here: Run, arguments: list[str], words: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    port = [] if "--port" in arguments else ["--port", "0"]
    assert words in fourbit_here("arena", *arguments, *port).complaint
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_extra_is_named(folder: Path, fourbit_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fourbit.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = fourbit_here("arena", "a.jsonl", "b.jsonl", *NEW)
    assert done.complaint == "Error: The arena needs fastapi; install it with `pip install 'fourbit[serve]'`."
    assert not (folder / "new.sqlite").exists()


def test_a_dry_run_writes_nothing(folder: Path, fourbit_here: Run) -> None:
    done = fourbit_here("arena", "a.jsonl", "b.jsonl", *NEW, "--raters", "anna,ben", "--dry-run", "--json")
    assert json.loads(done.out) == {
        "votes": "new.sqlite",
        "systems": ["a", "b"],
        "live": False,
        "prompts": 4,
        "pairs": 4,
        "raters": ["anna", "ben"],
        "votes_wanted": 8,
        "already": 0,
        "dry_run": True,
    }
    assert not (folder / "new.sqlite").exists()
    known = fourbit_here("arena", "--votes", "known.sqlite", "--raters", "ben", "--dry-run", "--json")
    assert json.loads(known.out) == json.loads(done.out) | {"votes": "known.sqlite"}
    with Store(folder / "known.sqlite") as store:
        assert set(store.raters) == {"anna"}
    shown = fourbit_here("arena", "--votes", "known.sqlite", "--dry-run").out
    assert [line.split()[-1] for line in shown.splitlines()[1:] if line.strip()] == ["b", "anna", "prompts", "1", "4"]
