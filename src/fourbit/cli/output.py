"""What a verb shows: its result on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from fourbit.words import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["AsJson", "Progress", "Show", "complain", "facts", "progress", "result", "rows", "sentences"]

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Show = Callable[[Mapping[str, Any], "Callable[[], RenderableType]"], None]
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

LINE_SECONDS = 30.0
"""How often progress is told where no bar can be drawn."""


@contextlib.contextmanager
def result(as_json: bool, *, wrap: bool = True) -> Iterator[Show]:
    """Keep stdout for the result: within the block, whatever libraries print goes to stderr.

    Args:
        as_json: print the keys, not the table.
        wrap: break lines at the terminal's width; a text whose every character counts is left to the terminal.

    Yields:
        show(keys, table): prints `keys` as one JSON object, or what `table()` returns.
    """
    with _stdout_kept() as stdout:

        def show(keys: Mapping[str, Any], table: Callable[[], RenderableType]) -> None:
            if as_json:
                print(json.dumps(keys, allow_nan=False), file=stdout)
            else:
                from rich.console import Console

                Console(file=stdout, highlight=False).print(table(), soft_wrap=not wrap)
            stdout.flush()

        yield show


@contextlib.contextmanager
def _stdout_kept() -> Iterator[TextIO]:
    """The real stdout, while sys.stdout and the file descriptor under it (for C libraries) lead to stderr."""
    given = sys.stdout
    given.flush()
    kept = os.dup(1)
    with os.fdopen(kept, "w", encoding=given.encoding, errors=given.errors) as real:
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield real if _is_descriptor_1(given) else given
        finally:
            os.dup2(kept, 1)


def _is_descriptor_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, io.UnsupportedOperation):  # in memory
        return False


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on stderr; where that is no terminal, a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich import progress as bars
    from rich.console import Console

    columns = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeRemainingColumn(),
    ]
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


class _Lines:
    """Progress for a log file: nothing about what is done soon, else a line every half minute."""

    def __init__(self) -> None:
        self._began = self._told = time.monotonic()
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if (now - self._told < LINE_SECONDS and done < total) or now - self._began < LINE_SECONDS:
            return
        self._told = now
        left = f", {duration((now - self._began) * (total - done) / done)} left" if 0 < done < total else ""
        print(f"{what}: {done:,} of {total:,}{left}", file=sys.stderr, flush=True)


def complain(sentence: str) -> None:
    """Say on stderr why the command ends."""
    if not sys.stderr.isatty():
        print(f"Error: {sentence}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text.assemble(("Error: ", "bold red"), sentence))


def facts(title: str, rows: Mapping[Any, str]) -> RenderableType:
    """A title, names and values."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True, min_width=20)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(str(name)), Text(value))
    return Group(Text(title, style="bold"), Padding(table, (0, 0, 0, 2), expand=False), "")


def rows(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], *, left: Collection[str] = ()
) -> RenderableType:
    """A title and a table: numbers to the right, the columns named in `left` to the left."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, header_style="cyan", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    return Group(Text(title, style="bold"), Padding(table, (0, 0, 0, 2), expand=False), "")


def sentences(given: Sequence[str]) -> RenderableType:
    """Sentences under a table, one to a line."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(sentence) for sentence in given), *([""] if given else []))
