"""`fourbit chat` over a pipe and in a real terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pty = pytest.importorskip("pty", reason="needs a Unix terminal")

Run = Callable[..., Any]

GREEDY = ("--temperature", "0", "--max-new-tokens", "15")


def piped(folder: Path, model: Path, said: bytes) -> subprocess.CompletedProcess[bytes]:
    """`fourbit chat` as another process, on what comes over a pipe."""
    command = [sys.executable, "-m", "fourbit", "chat", str(model), *GREEDY]
    return subprocess.run(command, input=said, capture_output=True, cwd=folder, timeout=120, check=False)


@pytest.fixture
def talk(stories_model: Path, fourbit_here: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`fourbit chat` in this process, on lines that do not come from a terminal."""

    def run(said: str, *arguments: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode()), encoding="utf-8"))
        return fourbit_here("chat", stories_model, *(arguments or GREEDY))

    return run


class Terminal:
    """A person at a terminal: types, and waits for what appears."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.seen = ""
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, "-m", "fourbit", *arguments])

    def wait(self, pattern: str, timeout_s: float = 60) -> str:
        """What appeared up to the pattern."""
        import select

        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._descriptor], [], [], left)[0]:
                try:
                    self.seen += os.read(self._descriptor, 4096).decode().replace("\r\n", "\n")
                except OSError:  # the other side has closed
                    assert re.search(pattern, self.seen), f"no {pattern!r} in {self.seen!r}"
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def end(self) -> int:
        """The exit code, once it ends."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        raise AssertionError(f"it goes on: {self.seen!r}")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_(*arguments: str | Path) -> Terminal:
        opened.append(Terminal([str(argument) for argument in arguments], tmp_path))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


def test_over_a_pipe_only_the_answers_are_printed(stories_model: Path, tmp_path: Path, talk: Run) -> None:
    done = piped(tmp_path, stories_model, b"Hello\n\nWhat next?\n/quit\nnever asked\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"\n") == 2
    assert b">" not in done.stdout
    assert b"Guanaco" in done.stderr
    assert done.stdout.decode() == talk("Hello\nWhat next?").out


def test_what_was_said_before_counts(talk: Run) -> None:
    first, second = talk("Hello\nWhat next?\n").out.splitlines()
    alone, again, other = talk("What next?\n/retry\n/reset\nHello\n").out.splitlines()
    assert second != alone == again
    assert other == first


def test_messages_of_several_lines(stories_model: Path, talk: Run) -> None:
    said = 'one\\\ntwo\n"""\nthree\n\n/four\n"""\n"""five"""\n'
    done = talk(said, *GREEDY, "--json", "--system", "Be kind.")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [message["content"] for message in found["messages"] if message["role"] == "user"] == [
        "one\ntwo", "three\n\n/four", "five"
    ]  # fmt: skip
    assert found["messages"][0] == {"role": "system", "content": "Be kind."}
    assert found["tokens"] == 45
    assert (found["model"], found["adapter"]) == (str(stories_model), None)


def test_the_commands(tmp_path: Path, talk: Run) -> None:
    (tmp_path / "there").write_text("")
    said = (
        "/help\n/retry\n/system Be kind.\nHello\n/retry\n/save talk.json\n/save there\n/save no/where\n/save\n/system\n"
        "/system -\n/reset\n/nonsense\n/exit\n"
    )
    done = talk(said)
    assert done.code == 0, done.err
    first, second = done.out.splitlines()
    assert first == second  # greedy
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][2]["content"] == first
    for sentence in (
        "/retry          answer the last question anew",
        "There is no question yet",
        "(The system says: Be kind.)",
        "there exists already",
        "where cannot be written",
        "/save needs the name",
        "(The system says nothing.)",
        "begins anew",
        "There is no /nonsense",
    ):
        assert sentence in done.err, sentence


def test_seeds(talk: Run) -> None:
    def drawn(*seed: str) -> str:
        return str(talk("Hello\n", "--temperature", "1", "--max-new-tokens", "25", *seed).out)

    assert drawn("--seed", "1") == drawn("--seed", "1") != drawn("--seed", "2")
    assert drawn() != drawn()


def test_an_adapter_tells(adapter: Path, talk: Run) -> None:
    tuned = talk("Hello\n", *GREEDY, "--adapter", str(adapter), "--json")
    assert tuned.code == 0, tuned.err
    found = json.loads(tuned.out)
    assert found["adapter"] == str(adapter)
    assert found["messages"][1]["content"] != talk("Hello\n").out.strip()


def test_the_oldest_messages_are_left_out(talk: Run) -> None:
    done = talk("There was a dog in the park. " * 10 + "\n" + "And then? He ran to the boy. \n" * 12)
    assert done.code == 0, done.err
    assert "(The oldest 2 messages do not fit into the model's context any more.)" in done.err


@pytest.mark.parametrize(
    ("said", "arguments", "says"),
    [
        ("a dog " * 400, [], "That is too long"),
        ("", ["--temperature", "-1"], "must be 0"),
        ("", ["--adapter", "nowhere"], "nowhere"),
        ("", ["--chat-template", "nonsense"], "nonsense"),
        ("", ["--dtype", "float8"], "float8"),
    ],
)
def test_bad_input(said: str, arguments: list[str], says: str, talk: Run) -> None:
    done = talk(said, *GREEDY, *arguments)
    assert (done.code, done.out.strip()) == (2, "")
    assert says in done.err.splitlines()[-1]
    assert done.err.count("Error: ") == 1


def test_bytes_that_are_no_text(stories_model: Path, tmp_path: Path) -> None:
    done = piped(tmp_path, stories_model, b"caf\xe9\n")
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr or b"surrogate" in done.stderr  # as the locale has it


def test_a_reader_that_leaves(stories_model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fourbit", "chat", str(stories_model), *GREEDY],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write("Hello\n" * 3)
    process.stdin.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert "Error" not in said
    assert "Traceback" not in said


def test_in_a_terminal(stories_model: Path, terminal: Callable[..., Terminal]) -> None:
    there = terminal("chat", stories_model, *GREEDY)
    there.wait("/help shows what there is besides talking; Ctrl-D ends.\n")
    there.wait("> ")
    there.type("Hello\n")
    first = there.wait("\n> ").splitlines()
    assert first[0] == "Hello"  # what was typed
    assert len(first[1]) > 10
    there.type("/reset\nHello\n")
    there.wait("begins anew.*\n")
    again = there.wait("\n> ").splitlines()
    assert again[-2] == first[1]
    there.type("one \\\n")
    there.wait(r"\. ")
    there.type("two\n")
    there.wait("\n> ")
    there.type('"""\nthree\n"""\n')
    there.wait(r"\. three\n\. .*\n.+\n> ")
    there.type("a dog " * 300 + "\n")
    there.wait("Error: That is too long")
    there.wait("\n> ")
    there.type("\x04")
    assert there.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(
    stories_model: Path, tmp_path: Path, terminal: Callable[..., Terminal]
) -> None:
    there = terminal("chat", stories_model, "--temperature", "0", "--max-new-tokens", "400", "--system", "Be kind.")
    there.wait("> ")
    time.sleep(0.5)  # Python notices a signal only once readline waits for a key, which is just after the prompt
    there.interrupt()
    there.wait(r"\(/quit or Ctrl-D ends\)\n")
    there.wait("> ")
    there.type("Once upon a time\n")
    there.wait(r"Once upon a time\n[\s\S]{20}")
    there.interrupt()
    there.wait("\n> ")
    there.type("/save cut.json\n")
    there.wait(r"\(The conversation is in cut.json.\)")
    answer = json.loads((tmp_path / "cut.json").read_text())["messages"][2]["content"]
    assert 15 < len(answer) < 800  # whole, it has more than 1,000 characters
    there.type("Hello\n")
    there.wait(r"Hello\n[\s\S]{5}")
    there.interrupt()
    there.wait("\n> ")
    there.type("/quit\n")
    assert there.end() == 0
