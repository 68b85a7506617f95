"""An arena as people meet it: the command in a process of its own, and a browser."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

HOSTILE = (
    "<script>document.title = 'caught'</script>\n\n<img src=x onerror=\"document.title = 'caught'\">\n\n"
    "[click](javascript:alert(1)) [site](http://example.org/away) ![seen](http://example.org/pixel.png)\n\n"
    "</div></main><h1 id=inserted>larger</h1>"
)
LONG_LINE = "<b>" + "x" * 100_000


class Reply(NamedTuple):
    """What the arena answers."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


class Arena:
    """`fourbit arena`, running.

    Attributes:
        keys: what it said of itself, its links above all.
    """

    def __init__(self, arguments: Sequence[str | Path], folder: Path) -> None:
        self._said = folder / "stderr.txt"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fourbit", "arena", "--port", "0", "--json", *map(str, arguments)],
                cwd=folder,
                env=os.environ | {"NO_PROXY": "*"},
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.said
        self.keys = json.loads(line)

    @property
    def said(self) -> str:
        """On stderr, so far."""
        return self._said.read_text()

    def token(self, rater: str) -> str:
        """The rater's."""
        return str(self.keys["raters"][rater].rpartition("/")[2])

    def ask(
        self, path: str, token: str | None = None, body: object = None, headers: dict[str, str] | None = None
    ) -> Reply:
        """One request; with a body it is a POST."""
        address = urlsplit(self.keys["organiser"])
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        try:
            connection.request("GET" if data is None else "POST", path, body=data, headers=sent)
            reply = connection.getresponse()
            return Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def vote(self, rater: str, choice: str) -> str:
        """On what comes next; returns the ticket."""
        ticket = self.ask("/api/next", self.token(rater)).json["pair"]["ticket"]
        found = self.ask("/api/vote", self.token(rater), {"ticket": ticket, "choice": choice})
        assert found.status == 200, found
        return str(ticket)

    def stop(self) -> None:
        """Ctrl-C, which is the regular end; nothing to do where it was killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            assert self._process.wait(timeout=20) == 0
            *_, last = self.said.splitlines()
            assert last.startswith("Stopped. ")
            assert last.endswith("; the same command goes on.")
            assert "Traceback" not in self.said
        self._close()

    def kill(self) -> None:
        """As a power cut would."""
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="session")
def answers() -> Callable[..., list[Path]]:
    """Writes files of answers to so many prompts; those to prompt 0 are hostile, and of 100 kB in one line."""

    def write(folder: Path, *names: str, prompts: int = 6) -> list[Path]:
        paths = []
        for place, name in enumerate(names):
            records = [
                {"id": n, "prompt": f"What is {n}?", "text": f"It is *{n}*, is it not{'?' * (place + 1)}"}
                for n in range(prompts)
            ]
            records[0]["text"] = LONG_LINE if place else HOSTILE
            paths.append(folder / f"{name}.jsonl")
            paths[-1].write_text("".join(json.dumps(record) + "\n" for record in records))
        return paths

    return write


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Arena]]:
    """Starts arenas, which end with the module, by Ctrl-C."""
    started: list[Arena] = []

    def run(*arguments: str | Path, folder: Path) -> Arena:
        started.append(Arena(arguments, folder))
        return started[-1]

    yield run
    for arena in started:
        arena.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window: FOURBIT_CHROMIUM, one on the PATH, or Playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("FOURBIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=named, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield found
        found.close()
