"""Documents out of text files: plain text, and the text of records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourbit.data.records import read_records, read_text
from fourbit.errors import InputError

__all__ = ["read_documents"]

_OF_RECORDS = (".json", ".jsonl", ".ndjson", ".parquet")  # a table in .csv or .tsv is scored as the text it is


def read_documents(path: str | Path, *, separator: str | None = None, field: str = "text") -> Iterator[str]:
    """Read the documents of a text file, in order.

    Args:
        path: `.jsonl` or `.ndjson` holds one JSON object per line, `.json` a list of objects, `.parquet` rows; any
            other name is plain UTF-8 text.
        separator: where plain text is split into documents, each without the white space around it. None takes the
            whole file as one document, byte for byte (but for a byte order mark).
        field: the field of a record that holds its text.

    Raises:
        InputError: names the file, and the line or record where there is one. MissingExtra: datasets for parquet.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a text file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {problem}.")
    if path.suffix.lower() not in _OF_RECORDS:
        return _plain_documents(path, separator)
    if separator is not None:
        raise InputError(f"A separator splits plain text; {path} already holds one document per record.")
    return _record_documents(path, field)


def _plain_documents(path: Path, separator: str | None) -> Iterator[str]:
    text = read_text(path)
    if separator is None:
        yield text
    elif not separator:
        raise InputError("The separator is empty; give the string that stands between two documents.")
    else:
        yield from (piece.strip() for piece in text.split(separator))


def _record_documents(path: Path, field: str) -> Iterator[str]:
    records = read_records(path)
    for place, record in zip(records.places, records.rows, strict=True):
        yield _text_of(record, field, place)


def _text_of(record: dict[str, Any], field: str, place: str) -> str:
    if field not in record:
        raise InputError(
            f"{place}: the record has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}."
        )
    if not isinstance(text := record[field], str):
        given = json.dumps(text, default=str)
        raise InputError(f"{place}: the field {field!r} must be a string, not {given[:60]}.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{place}: the field {field!r} holds half of a surrogate pair, which is not text.")
    return text
