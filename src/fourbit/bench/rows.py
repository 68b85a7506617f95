"""Measured rows and the CSV file they are kept in, one row per case and contender."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fourbit.errors import InputError

__all__ = ["Row", "append", "check", "latest", "read"]


@dataclass(frozen=True)
class Row:
    """One contender in one case, and all that the numbers depend on.

    Attributes:
        run: when the run began, UTC; rows of one run share it.
        commit, cpu, cores, memory_bytes, kernel: the source and the machine.
        level: the SIMD level that our kernels ran at; empty for others.
        fourbit, python, torch, transformers, peft, bitsandbytes: versions.
        case, contender, unit: what was measured; see `bench.case`.
        median, minimum, maximum: of the samples, in `unit`.
        samples: taken in all, over `rounds` processes.
        share, share_of: the part drawn of a limit of the machine, measured in the same rounds.
        ready_rss_bytes: resident when set up, before the first call.
        peak_rss_bytes: the largest resident size of the process, the median over its rounds.
        check: a number out of the result, for comparing contenders.
        others: the part of the processors' time that others took while the case was measured; empty if unknown.
    """

    run: str
    commit: str
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    level: str
    fourbit: str
    python: str
    torch: str
    transformers: str
    peft: str
    bitsandbytes: str
    case: str
    contender: str
    unit: str
    median: float
    minimum: float
    maximum: float
    samples: int
    rounds: int
    share: float | None
    share_of: str
    ready_rss_bytes: int
    peak_rss_bytes: int
    check: float
    others: float | None


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
    "str": str,
}
_COLUMNS = {item.name: _PARSERS[str(item.type)] for item in fields(Row)}


def check(path: Path) -> None:
    """Whether rows can be added to a file. Its folder is made if need be, and the file itself only by `append`.

    Raises:
        InputError: the file holds something else, or cannot be written.
    """
    fresh = not path.exists()
    try:
        if not fresh:
            read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):  # the only sure way to know
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; give another name.") from error
    if fresh:
        path.unlink()


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, which is made if need be.

    Raises:
        InputError: the file holds something else, or cannot be written.
    """
    check(path)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(_COLUMNS), lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(value) for name, value in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """The rows of a file, in order.

    Raises:
        InputError: it is not one of ours.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if list(reader.fieldnames or []) != list(_COLUMNS):
                raise InputError(f"{path} is not a file of benchmark rows; give another name.")
            return [_row(record) for record in reader]
    except (UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds a row that cannot be read: {error}.") from error


def latest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each case's last run, by case."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        kept = found.setdefault(row.case, [])
        if kept and kept[0].run != row.run:
            kept.clear()
        kept.append(row)
    return found


def _row(record: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {name: parse(record[name]) for name, parse in _COLUMNS.items()}
    return Row(**values)


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
