"""Prompts by name, from a server that behaves and from some that do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.generate import prompt_sets
from fourbit.generate.prompt_sets import PROMPT_SETS, PromptSet, find_prompts
from fourbit.generate.prompts import read_prompts

CONTENT = "".join(json.dumps({"question_id": each, "turns": [f"Question {each}?"]}) + "\n" for each in (1, 2, 3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fourbit" / "prompts"


@pytest.fixture
def asked_for() -> list[str]:
    return []


@pytest.fixture
def address(asked_for: list[str]) -> Iterator[str]:
    """A server of CONTENT under /good; of half of it under /short, and under /half where all is promised."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_for.append(self.path)
            self.send_response(200 if self.path in ("/good", "/short", "/half") else 404)
            if self.path == "/half":
                self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write((CONTENT if self.path == "/good" else CONTENT[:60]).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setitem(prompt_sets.PROMPT_SETS, "vicuna", PromptSet(address, 3, "three questions"))


def test_a_set_is_fetched_once(
    address: str, asked_for: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, f"{address}/good")
    for _ in range(2):
        assert [each.given for each in read_prompts("vicuna")] == ["Question 1?", "Question 2?", "Question 3?"]
    assert asked_for == ["/good"]
    assert [each.name for each in cache.iterdir()] == ["vicuna.jsonl"]


def test_a_file_goes_before_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vicuna").write_text("{}")
    assert find_prompts("vicuna") == "vicuna"


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("/short", "is not vicuna: it has 2 lines in place of 3"),
        ("/none", r"cannot be downloaded now .*404.*; get "),
        ("/half", r"cannot be downloaded now .*IncompleteRead"),
    ],
)
def test_what_is_not_the_set_is_not_kept(
    page: str, says: str, address: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, address + page)
    with pytest.raises(InputError, match=says):
        find_prompts("vicuna")
    assert not cache.exists()


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "http://127.0.0.1:9/none")
    with pytest.raises(InputError, match=r"three questions.*cannot be downloaded now.*give that file"):
        find_prompts("vicuna")


def test_a_cache_that_cannot_be_written(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, f"{address}/good")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"cannot be kept in .*; set XDG_CACHE_HOME"):
        find_prompts("vicuna")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("Vicunia", "Vicunia does not exist; did you mean vicuna"),
        (
            "elsewhere.jsonl",
            "does not exist; give a file, a dataset of the hub as owner/name, or vicuna, openassistant",
        ),
        ("folder/elsewhere.jsonl", "does not exist"),
        ("", "no source"),
    ],
)
def test_what_is_nothing(source: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_prompts(source)


def test_what_is_read_elsewhere(tmp_path: Path) -> None:
    assert find_prompts("owner/name") == "owner/name"
    with pytest.raises(InputError, match="is a folder"):
        find_prompts(tmp_path)


def test_addresses_do_not_change() -> None:
    for found in PROMPT_SETS.values():
        assert any(len(part) == 40 and int(part, 16) for part in found.address.split("/") if part.isalnum())
