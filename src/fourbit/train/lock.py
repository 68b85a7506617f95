"""One run a folder at a time. The kernel holds the lock for the process, and frees it however that ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from fourbit.errors import OutputExists

try:
    import fcntl
except ModuleNotFoundError:  # pragma: no cover  # Windows: there two runs in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK_FILE", "FolderLock"]

LOCK_FILE = ".fourbit.lock"


class FolderLock:
    """The right to write into the folder of a run, from `acquire` to `release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take it; the folder must exist.

        Raises:
            OutputExists: another run has it.
        """
        self._file = self._open()
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def check(self) -> None:
        """Say now what `acquire` would say.

        Raises:
            OutputExists: another run has it.
        """
        if self._path.exists():
            self._open().close()

    def release(self) -> None:
        """Give it back, and leave nothing behind."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _open(self) -> IO[str]:
        while True:
            file = self._path.open("a+", encoding="utf-8")
            try:
                _lock(file)
            except BlockingIOError:
                holder = _holder(file)
                file.close()
                raise OutputExists(
                    f"Another run{holder} is writing into {self._path.parent}; wait for its end, stop it, or choose"
                    " another output."
                ) from None
            except OSError:  # a file system without locks
                return file
            if _is_at(file, self._path):
                return file
            file.close()  # whoever held it has removed it meanwhile


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    number = file.read().strip()
    return f" (process {number})" if number.isdigit() else ""
