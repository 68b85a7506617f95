"""Measured rows and the CSV file they are kept in, one row per case and contender."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

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
        device: the accelerator that did the work; empty where it was the CPU.
        peak_device_bytes: what torch's allocator held of that accelerator at most.
        libraries: versions of what else took part: "triton 3.6.0, torchao 0.18.0".
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
    device: str = ""
    peak_device_bytes: int = 0
    libraries: str = ""


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
    "str": str,
}
_COLUMNS = {item.name: _PARSERS[str(item.type)] for item in fields(Row)}
_LATER = {item.name for item in fields(Row) if item.default is not MISSING}
"""Columns that older files do not have."""


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
    kept = read(path) if path.exists() else []
    if kept and _header(path) == list(_COLUMNS):
        with path.open("a", newline="") as file:
            _write(file, rows)
        return
    with path.open("w", newline="") as file:  # new, or of a time when rows had fewer columns
        csv.writer(file, lineterminator="\n").writerow(_COLUMNS)
        _write(file, [*kept, *rows])


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _write(file: TextIO, rows: Iterable[Row]) -> None:
    writer = csv.DictWriter(file, list(_COLUMNS), lineterminator="\n")
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
            found = list(reader.fieldnames or [])
            if [name for name in _COLUMNS if name in found or name not in _LATER] != found:
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
    values: dict[str, Any] = {name: _COLUMNS[name](text) for name, text in record.items()}
    return Row(**values)


def _text(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
