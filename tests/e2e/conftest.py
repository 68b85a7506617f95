"""The command as a user runs it: its exit code, its stdout and its stderr."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fourbit.cli import main


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one sentence of a command that refused its input: exit code 2, stdout empty, one line on stderr."""
        assert self.code == 2, self.err
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("Error: ")
        assert line.endswith((".", "?", ")"))
        return line


@pytest.fixture
def fourbit_command(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs `fourbit ARGUMENTS...` as another process in an empty folder."""

    def run(*arguments: str | Path, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "fourbit", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def fourbit_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """The same through the console script's function, in this process, where torch is imported already."""
    monkeypatch.delenv("FOURBIT_DEBUG", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for logger in (logging.getLogger(), logging.getLogger("fourbit")):
        monkeypatch.setattr(logger, "handlers", list(logger.handlers))
        monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    with warnings.catch_warnings():
        yield run
