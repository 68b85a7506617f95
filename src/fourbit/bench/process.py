"""The other end of `bench.worker`: starts a contender's process and talks to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

__all__ = ["ContenderFailed", "Process", "started"]


class ContenderFailed(Exception):
    """A contender's process gave up; the message is the last line that it wrote."""


@contextlib.contextmanager
def started(arguments: list[str], environment: Mapping[str, str]) -> Iterator[Process]:
    """A worker process, which is gone when the block is left.

    Args:
        arguments: of `bench.worker`.
        environment: variables to set beside our own.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [sys.executable, "-m", "fourbit.bench.worker", *arguments]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
        ) as process:
            try:
                yield Process(process, log)
            finally:
                process.kill()
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # what it never read is still in the buffer
                    process.stdin.close()


class Process:
    """A running worker."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process, self._log = process, log
        self.failed = False

    def ask(self, word: str) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then its last words are in the log, and `answer` reads them
            print(word, file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the next answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._fail()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def wait(self) -> None:
        """Wait until it ends by itself."""
        if self._process.wait() != 0:
            self._fail()

    def _fail(self) -> None:
        self.failed = True
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        raise ContenderFailed(lines[-1] if lines else f"its process ended with {self._process.returncode}")
