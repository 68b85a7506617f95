"""Who rated: ratings by rater, and benchmarks that rank the same models."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fourbit.data.records import read_records
from fourbit.errors import InputError
from fourbit.evaluate.ratings import Rating, read_ratings

__all__ = ["read_benchmark", "read_raters"]


def read_raters(
    sources: Sequence[tuple[str | None, str]],
    *,
    answers: Sequence[str | os.PathLike[str]] = (),
    names: Mapping[str, str] | None = None,
) -> dict[str, list[Rating]]:
    """Read ratings and sort them by who gave them.

    Args:
        sources: the rater's name, or None, and a file or folder. Without a name the records' own raters count, and the
            name of the file or folder for records without. With one, records of several raters are `name/rater`.
        answers, names: see `read_ratings`. Sources are read one by one, so that equal ids in two of them are apart; the
            new names are for systems of all sources together.

    Raises:
        InputError: see `read_ratings`; one rater by two names.
    """
    found: dict[str, list[Rating]] = {}
    seen: dict[Path, str] = {}
    read = []
    for name, source in sources:
        resolved = Path(source).resolve()
        if resolved in seen:
            raise InputError(f"{source} is given twice; its ratings would count twice.")
        seen[resolved] = source
        read.append((name, source, read_ratings(source, answers=answers)))
    known = {system for *_, ratings in read for rating in ratings for system in (rating.first, rating.second)}
    if unknown := [system for system in names or {} if system not in known]:
        raise InputError(f"No rating speaks of {unknown[0]!r}; the systems are {', '.join(sorted(known))}.")
    for name, source, ratings in read:
        several = len({rating.rater for rating in ratings}) > 1
        for rating in _with_names(ratings, names or {}):
            rater = rating.rater or Path(source).stem
            if name is not None:
                rater = f"{name}/{rater}" if several else name
            found.setdefault(rater, []).append(rating)
    return found


def _with_names(ratings: Sequence[Rating], names: Mapping[str, str]) -> list[Rating]:
    from dataclasses import replace

    return [
        replace(rating, first=names.get(rating.first, rating.first), second=names.get(rating.second, rating.second))
        for rating in ratings
    ]


def read_benchmark(name: str | None, source: str) -> dict[str, dict[str, float]]:
    """Read scores of models: records with `model` and one or more numbers.

    Args:
        name: of the benchmark; by default that of its column, or of the file where the column is `score`.
        source: a .csv, .tsv, .json, .jsonl or .parquet file.

    Returns:
        Benchmark -> model -> score, where more is better.

    Raises:
        InputError: names the file and the row.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source} is no file; give a table with the columns model and score.")
    records = read_records(path)
    found: dict[str, dict[str, float]] = {}
    for record, place in zip(records.rows, records.places, strict=True):
        model = record.get("model")
        if not isinstance(model, str) or not model.strip():
            raise InputError(f"{place} names no model; a benchmark has the columns model and score.")
        columns = {key: value for key, value in record.items() if key != "model"}
        if not columns:
            raise InputError(f"{place} has no score beside its model.")
        for key, value in columns.items():
            plain = name or path.stem if key == "score" or len(columns) == 1 else f"{name}/{key}" if name else key
            scores = found.setdefault(plain, {})
            if model.strip() in scores:
                raise InputError(f"{place}: {model} has a score of {plain} already.")
            scores[model.strip()] = _number(value, place, key)
    return found


def _number(value: object, place: str, key: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{place}: {key} is {str(value)[:80]!r}; it must be a number.")
    return number
