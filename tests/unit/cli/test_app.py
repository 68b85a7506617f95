"""Exit codes and the one sentence, through the same door as the console script."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator

import pytest

import fourbit
from fourbit.cli import app, main


@pytest.fixture(autouse=True)
def process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command sets up its process; a test has to put it back."""
    monkeypatch.delenv("FOURBIT_DEBUG", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    root, ours = logging.getLogger(), logging.getLogger("fourbit")
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(ours, "handlers", list(ours.handlers))
    monkeypatch.setattr(ours, "propagate", ours.propagate)
    with warnings.catch_warnings():
        yield


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr, which must be one line, with nothing on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("Error: ")
    return line


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fourbit {fourbit.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("quantize", "eval", "bench", "doctor"))
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(("typed", "meant"), [("quantise", "quantize"), ("doctr", "doctor"), ("evall", "eval")])
def test_an_unknown_verb_gets_the_nearest_one(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    assert f"Did you mean '{meant}'?" in only_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize"], "MODEL"),
        (["quantize", "model"], "OUT"),
        (["quantize", "model", "out", "--block-size", "many"], "--block-size"),
        (["quantize", "model", "out", "--blok-size", "64"], "--block-size"),
        (["eval"], "`fourbit eval --help`"),
        (["eval", "perplexity", "model"], "--text"),
        (["doctor", "now"], "now"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    line = only_line(capsys)
    assert words in line
    assert "--help` shows what is possible." in line


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (fourbit.errors.InputError("The text is empty."), 2, "Error: The text is empty."),
        (KeyboardInterrupt(), 130, "Error: Interrupted."),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_escapes_a_verb(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def examine() -> None:
        raise error

    monkeypatch.setattr("fourbit.cli.doctor._examine", examine)
    assert main(["doctor"]) == code
    assert words in only_line(capsys)


def test_libraries_are_silent_and_we_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would hide that Python prints them

    def examine() -> None:
        warnings.warn("a library warns", stacklevel=1)
        logging.getLogger("a.library").warning("a library logs")
        logging.getLogger("fourbit.models").warning("two tensors are left")
        raise fourbit.errors.InputError("stop")

    monkeypatch.setattr("fourbit.cli.doctor._examine", examine)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "Warning: two tensors are left\nError: stop\n"


def test_every_command_has_a_help_text() -> None:
    import typer

    command = typer.main.get_command(app.app)
    for name, child in command.commands.items():
        assert child.help, name
        assert len(child.get_short_help_str(limit=200)) <= 64, f"the first sentence of {name} does not fit its line"
