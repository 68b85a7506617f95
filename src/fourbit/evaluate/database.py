"""What SQLite says, as a sentence to the person whose file it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourbit.errors import InputError

__all__ = ["explained"]


@contextmanager
def explained(kind: str, path: Path, *, program: str, option: str) -> Iterator[None]:
    """Make an `InputError` of whatever SQLite raises in the block.

    Args:
        kind: what the file is: "cache".
        program: whose it is, and who may be using it.
        option: that names it on the command line.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(f"The {kind} {path} {_problem(str(error), kind, program, option)}") from error


def _problem(said: str, kind: str, program: str, option: str) -> str:
    if "locked" in said:
        return f"is in use by another {program}; wait for it, or choose another with {option}."
    if "full" in said:
        return "cannot grow, as the disk is full; free some space, and the same command goes on."
    if "readonly" in said or "unable to open" in said:
        return f"cannot be opened for writing; choose another with {option}."
    if "malformed" in said or "not a database" in said:
        return f"is damaged, or no {kind} of {program} ({said}); move it away, or choose another with {option}."
    return f"cannot be used: {said}."
