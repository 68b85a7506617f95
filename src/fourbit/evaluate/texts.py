"""Documents out of text files: plain text, JSON records, parquet."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fourbit.errors import InputError, MissingExtra

__all__ = ["read_documents"]


def read_documents(path: str | Path, *, separator: str | None = None, field: str = "text") -> Iterator[str]:
    """Read the documents of a text file, in order.

    Args:
        path: `.jsonl` or `.ndjson` holds one JSON object per line, `.json` a list of objects, `.parquet` rows; any
            other name is plain UTF-8 text.
        separator: where plain text is split into documents, each without the white space around it. None takes the
            whole file as one document, byte for byte (but for a byte order mark).
        field: the field of a record that holds its text.

    Raises:
        InputError: names the file, and the line or record where there is one. MissingExtra: pyarrow for parquet.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder, not a text file" if path.is_dir() else "does not exist"
        raise InputError(f"{path} {problem}.")
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".json", ".parquet"):
        return _plain_documents(path, separator)
    if separator is not None:
        raise InputError(f"A separator splits plain text; {path} already holds one document per record.")
    if kind == ".parquet":
        return _parquet_documents(path, field)
    return _json_documents(path, field) if kind == ".json" else _jsonl_documents(path, field)


def _plain_documents(path: Path, separator: str | None) -> Iterator[str]:
    text = _decoded(path)
    if separator is None:
        yield text
    elif not separator:
        raise InputError("The separator is empty; give the string that stands between two documents.")
    else:
        yield from (piece.strip() for piece in text.split(separator))


def _jsonl_documents(path: Path, field: str) -> Iterator[str]:
    # Split at line feeds only: str.splitlines would also cut at the other line separators a JSON string may hold.
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _text_of(_parsed(line, where), field, where)


def _json_documents(path: Path, field: str) -> Iterator[str]:
    records = _parsed(_decoded(path), str(path))
    if not isinstance(records, list):
        raise InputError(f"{path} must hold a JSON list of records, not {_json_name(records)}.")
    for number, record in enumerate(records, start=1):
        yield _text_of(record, field, f"{path}, record {number}")


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        arrow: Any = importlib.import_module("pyarrow")
    except ModuleNotFoundError as error:
        raise MissingExtra("Reading parquet needs pyarrow: pip install 'fourbit[eval]'.") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise InputError(f"{path} has no column {field!r}; it has {', '.join(columns)}.")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _text_of({field: value}, field, f"{path}, row {number}")
    except arrow.lib.ArrowException as error:
        raise InputError(f"{path} is not a parquet file that can be read: {str(error).splitlines()[0]}") from error


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first, with iconv for example."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _parsed(text: str, where: str) -> object:
    try:
        parsed: object = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON: {str(error).partition(':')[0]}.") from error
    return parsed


def _text_of(record: object, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise InputError(f"{where}: a record must be a JSON object with a field {field!r}, not {_json_name(record)}.")
    if field not in record:
        raise InputError(
            f"{where}: the record has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'}."
        )
    if not isinstance(text := record[field], str):
        raise InputError(f"{where}: the field {field!r} must be a string, not {_json_name(text)}.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{where}: the field {field!r} holds half of a surrogate pair, which is not text.")
    return text


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
