"""Writes docs/cli.md from the commands themselves. `--check` only says whether the page is up to date."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fourbit.cli import main
from fourbit.cli.app import app

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = "# The command line\n\n<!-- Written by `make gen`; do not edit. -->\n"


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all commands, the groups before what is in them."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


def section(path: tuple[str, ...]) -> str:
    """The help of one command, as it is shown in a terminal of 80 columns."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        main([*path, "--help"])
    return f"\n## {' '.join(('fourbit', *path))}\n\n```text\n{text.getvalue().strip()}\n```\n"


def write(*, check: bool) -> int:
    os.environ["COLUMNS"] = "80"
    page = HEAD + "".join(section(path) for path in commands(typer.main.get_command(app)))
    if check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        print("docs/cli.md does not show the commands as they are; run `make gen`.", file=sys.stderr)
        return 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(write(check="--check" in sys.argv[1:]))
