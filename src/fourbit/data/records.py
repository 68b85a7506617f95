"""Records out of files and hub datasets: JSON, JSON lines, CSV, parquet."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from fourbit.errors import InputError, MissingExtra

__all__ = [
    "SUFFIXES",
    "Record",
    "Records",
    "hub_answers",
    "load_splits",
    "offline",
    "read_records",
    "read_text",
    "record_id",
]

Record: TypeAlias = dict[str, Any]

_TIMEOUT_S = 10

TEXT_SUFFIX = ".txt"
END_OF_TEXT = "<|endoftext|>"
"""What stands on a line of its own between the documents of many text files."""

_LONGEST_CELL = 2**31 - 1
"""Characters; csv's own limit of 131,072 is less than a document."""

_CSV_LIMIT = threading.Lock()


@dataclass(frozen=True)
class Records:
    """Records and where each came from.

    Attributes:
        source: what they were read from, as it was given.
        rows: the records.
        places: for each, what to call it in a message: "answers.jsonl, line 3".
        evaluation: the records that the source itself holds out for evaluation; empty where it does not.
        is_plain_text: whether they are the documents of text files, each a `text`.
    """

    source: str
    rows: list[Record]
    places: list[str]
    evaluation: Records | None = None
    is_plain_text: bool = False


def record_id(record: Mapping[str, Any], number: int, where: str) -> str | int:
    """What a record calls itself: its id, question_id or message_id, or else its number.

    Raises:
        InputError: that is neither text nor a whole number.
    """
    for name in ("id", "question_id", "message_id"):
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise InputError(f"{where}: the {name} must be text or a whole number.")
        return value
    return number


def read_records(
    source: str | os.PathLike[str], *, split: str | None = None, limit: int | None = None, texts: bool = False
) -> Records:
    """Read the records of a file, of a folder of such files, or of a dataset on the hub.

    Args:
        source: a .json (a list of objects), .jsonl or .ndjson, .csv, .tsv or .parquet file, a folder of them, or a name
            on the hub. In a folder and on the hub, what is called eval, validation or test is held out.
        split: the split to take, where the source has several; "train" or the only one by default.
        limit: read the first so many records only.
        texts: take .txt files as well: each is a document, or several with a line of END_OF_TEXT between them. In a
            folder they are taken where nothing else in it can be.

    Raises:
        InputError: names the file, and the line or record where there is one. MissingExtra: it needs datasets.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit}; at least one record must be read.")
    path = Path(source)
    if path.is_file():
        if split is not None:
            raise InputError(f"{source} is one file, which has no split {split!r}; leave the split out.")
        if path.suffix.lower() not in SUFFIXES and not (texts and _is_text(path)):
            given = ", ".join((*SUFFIXES, TEXT_SUFFIX) if texts else SUFFIXES)
            raise InputError(f"{path} is of no kind that can be read; give {given}.")
        records = _gathered(str(source), [path], limit)
    elif path.is_dir():
        records = _from_folder(path, split, limit, texts=texts)
    elif _looks_like_a_path(str(source)):
        raise InputError(f"{source} does not exist; give a file, a folder, or a dataset of the hub as owner/name.")
    else:
        records = _from_hub(str(source), split, limit)
    if not records.rows:
        raise InputError(f"{source} holds no records.")
    return records


def _looks_like_a_path(source: str) -> bool:
    return source.count("/") != 1 or source.startswith((".", "/", "~")) or Path(source).suffix.lower() in SUFFIXES


def _gathered(source: str, files: list[Path], limit: int | None) -> Records:
    rows: list[Record] = []
    places: list[str] = []
    for file in files:
        for place, record in islice(_from_file(file), None if limit is None else limit - len(rows)):
            rows.append(record)
            places.append(place)
    return Records(source, rows, places, is_plain_text=any(map(_is_text, files)))


def _from_file(path: Path) -> Iterator[tuple[str, Record]]:
    read = _documents if _is_text(path) else SUFFIXES[path.suffix.lower()]
    for place, record in read(path):
        if not isinstance(record, dict):
            raise InputError(f"{place}: a record must be a JSON object, not {_json_name(record)}.")
        yield place, record


def _from_folder(folder: Path, split: str | None, limit: int | None, *, texts: bool) -> Records:
    everything = sorted(file for file in folder.rglob("*") if file.is_file() and _is_data(file.relative_to(folder)))
    files = [file for file in everything if not _is_text(file)] or (everything if texts else [])
    if not files:
        raise InputError(f"{folder} holds no file to read; give {', '.join(SUFFIXES)}.")
    if split is not None:
        chosen = [file for file in files if split in file.relative_to(folder).as_posix()]
        if not chosen:
            raise InputError(f"{folder} holds no file with {split!r} in its name.")
        return _gathered(str(folder), chosen, limit)
    held = [file for file in files if _is_held_out(file.stem) or any(map(_is_held_out, file.relative_to(folder).parts))]
    training = [file for file in files if file not in held]
    if not training:
        return _gathered(str(folder), held, limit)
    found = _gathered(str(folder), training, limit)
    evaluation = _gathered(str(folder), held, None) if held else None
    return Records(found.source, found.rows, found.places, evaluation, found.is_plain_text)


def _is_data(path: Path) -> bool:
    """Whether a file of a folder holds records: not what git, the hub and datasets keep beside them."""
    hidden = any(part.startswith(".") for part in path.parts)
    readable = path.suffix.lower() in SUFFIXES or _is_text(path)
    return readable and not hidden and path.name not in ("dataset_info.json", "dataset_infos.json")


def _is_text(path: Path) -> bool:
    return path.suffix.lower() == TEXT_SUFFIX


def _is_held_out(name: str) -> bool:
    return name.lower().split("-")[0].split("_")[0] in (
        "eval",
        "evaluation",
        "validation",
        "valid",
        "val",
        "test",
        "dev",
    )


def _documents(path: Path) -> Iterator[tuple[str, Any]]:
    documents = re.split(rf"^{re.escape(END_OF_TEXT)}\r?$", read_text(path), flags=re.MULTILINE)
    if len(documents) == 1:
        yield from ((str(path), {"text": text}) for text in documents if text.strip())
        return
    for number, text in enumerate(documents, start=1):
        if text.strip():
            yield f"{path}, document {number}", {"text": text.strip("\n")}


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    # Split at line feeds only: str.splitlines would also cut at the other line separators a JSON string may hold.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parsed(line, place)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    if _is_lines(text):  # JSON lines are often called .json
        yield from _jsonl(path)
        return
    found = _parsed(text, str(path))
    if isinstance(found, dict) and len(lists := [value for value in found.values() if isinstance(value, list)]) == 1:
        found = lists[0]  # {"data": [...]}
    if not isinstance(found, list):
        raise InputError(
            f"{path} must hold a JSON list of records, not {_json_name(found)}; is it JSON lines (.jsonl)?"
        )
    for number, record in enumerate(found, start=1):
        yield f"{path}, record {number}", record


def _is_lines(text: str) -> bool:
    lines = [line for line in text.split("\n", 20) if line.strip()]
    return len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}")


def _table(kind: str) -> Callable[[Path], Iterator[tuple[str, Any]]]:
    def read(path: Path) -> Iterator[tuple[str, Any]]:
        datasets = _datasets() if kind == "parquet" else None
        settings = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty.")
        try:
            rows = datasets.Dataset.from_parquet(str(path)) if datasets else _csv(path, **settings)
        except InputError:
            raise
        except Exception as error:  # of pyarrow, wrapped by datasets
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split())[:200].rstrip(".")
            raise InputError(f"{path} is no {kind} file that can be read: {reason}.") from error
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row

    return read


def _csv(path: Path, *, delimiter: str = ",") -> list[Record]:
    import csv
    import io

    # Cells stay text: an answer "007" is not the number 7.
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    with _CSV_LIMIT:
        before = csv.field_size_limit(_LONGEST_CELL)
        try:
            found = list(rows)
        finally:
            csv.field_size_limit(before)
    for number, row in enumerate(found, start=1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has not as many cells as the header")
    return found


SUFFIXES: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _table("CSV"),
    ".tsv": _table("CSV"),
    ".parquet": _table("parquet"),
}
"""How a file is read, by the end of its name."""


def _from_hub(name: str, split: str | None, limit: int | None) -> Records:
    splits = load_splits(name)
    names = list(splits)
    held = next((key for key in names if _is_held_out(key)), None)
    taken = split or ("train" if "train" in names else names[0])
    if taken not in names:
        raise InputError(f"{name} has no split {taken!r}; it has {', '.join(names)}.")

    def records(key: str, most: int | None) -> Records:
        rows = [dict(row) for row in islice(splits[key], most)]
        return Records(name, rows, [f"{name}, {key}, row {number}" for number in range(1, len(rows) + 1)])

    found = records(taken, limit)
    return Records(name, found.rows, found.places, records(held, None) if held and held != taken else None)


def load_splits(name: str, subset: str | None = None) -> Any:
    """The splits of a dataset on the hub, or in the local cache where the hub cannot be reached.

    Raises:
        InputError: it is not to be had. MissingExtra: datasets is not installed.
    """
    datasets = _datasets()
    import huggingface_hub
    from huggingface_hub import errors

    reachable = True
    try:  # datasets itself would first try for half a minute, and tell of each time
        huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT_S)
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} is gated: ask for access on its page on the hub, then log in (`hf auth login`)."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"{name} is no file or folder here, and no dataset of that name on the hub that you can see."
        ) from error
    except Exception:  # whatever a network does
        reachable = False
    try:
        with nullcontext() if reachable else offline():
            return datasets.load_dataset(name, subset)
    except Exception as error:
        if not reachable:
            raise InputError(
                f"{name} is no file or folder here, it is not in the local cache of datasets, and the hub cannot be"
                " reached (offline?)."
            ) from error
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise InputError(f"The dataset {name} on the hub cannot be read: {reason}.") from error


def hub_answers() -> bool:
    """Whether the hub can be reached at all, known within seconds."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().dataset_info("cais/mmlu", timeout=_TIMEOUT_S)
    except errors.HfHubHTTPError:  # an answer, whatever it says
        return True
    except Exception:  # whatever a network does
        return False
    return True


@contextmanager
def offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE, which is read only once, at import."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "Reading parquet and hub datasets needs datasets; install it with `pip install 'fourbit[train]'`."
        ) from error
    datasets.disable_progress_bars()
    return datasets


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        InputError: it is none, or cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first, with iconv for example."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # of JSON itself; an int of more digits than Python reads
        raise InputError(f"{where} is not valid JSON: {str(error).partition(':')[0]}.") from error


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
