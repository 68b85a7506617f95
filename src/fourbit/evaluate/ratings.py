"""Ratings of pairs of answers out of files: ours, the paper's released ones, FastChat's, and plain tables.

What a record is, it says by its fields:

    first, second, label            ours: 1 the first answer is better, 2 the second, 3 a tie, -1 could not be parsed
    answer1_id, answer2_id, score   the paper's and FastChat's reviews: a label as above, or two scores
    model_1, model_2, g1_winner     FastChat's judgements of pairs, both presentation orders in one record
    model_a, model_b, winner        a vote: model_a, model_b, a name, tie; two systems, shown in this order

The second kind carries its systems only in the file name, `ONE-vs-OTHER...`, and the name is not always in the order of
the presentation. The ids of the answers tell it; see `identities`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourbit.data.records import SUFFIXES, Record, read_records
from fourbit.errors import InputError
from fourbit.evaluate.identities import Review, identified
from fourbit.files import replace_file

__all__ = ["DROPPED", "FIRST", "SECOND", "TIE", "Rating", "read_ratings", "write_ratings"]

FIRST, SECOND, TIE, DROPPED = 1, 2, 3, -1

_TIES = {"tie", "tie (bothbad)", "both_bad", "bothbad", "both bad", "both", "neither", "draw"}
_DROPS = {"", "error", "-1", "none", "null", "nan", "unparsed"}


@dataclass(frozen=True)
class Rating:
    """What one rater said of two answers to a prompt.

    Attributes:
        first, second: the systems, in the order in which their answers were shown.
        label: 1 the first is better, 2 the second, 3 a tie, -1 what the rater said could not be parsed.
        prompt: what was asked; "" where it is not known.
        rater: who says so, a person or a judge; "" where it is not known.
        scores: of the first and of the second answer, where the rater gave scores.
        turn: which turn of the conversation was rated; "" where there is one only.
        place: where it was read, for messages.
    """

    first: str
    second: str
    label: int
    prompt: str = ""
    rater: str = ""
    scores: tuple[float, float] | None = None
    turn: str = ""
    place: str = ""


def read_ratings(
    sources: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    *,
    answers: Sequence[str | os.PathLike[str]] = (),
    names: Mapping[str, str] | None = None,
) -> list[Rating]:
    """Read ratings out of files and folders, each once.

    Args:
        sources: .jsonl, .json, .csv, .tsv or .parquet files, and folders of them.
        answers: files or folders of answers with ids, which say whose answer an id is. Seldom needed: ids that occur in
            files of several pairs tell by themselves.
        names: what to call a system in place of the name that it is given in the files.

    Returns:
        Ratings in the order of the files. One record of FastChat's pairs gives two.

    Raises:
        InputError: names the file and the line. A log line warns of systems that had to be taken from file names.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    found: list[Rating] = []
    reviews: dict[int, Review] = {}
    for file in _files(given):
        records = read_records(file)
        for record, place in zip(records.rows, records.places, strict=True):
            for rating in _ratings(record, file, place):
                if not {"first", "second"} <= record.keys() and {"answer1_id", "answer2_id"} <= record.keys():
                    ids = str(record["answer1_id"]), str(record["answer2_id"])
                    reviews[len(found)] = Review(*ids, rating.first, rating.second, file)
                found.append(rating)
    if reviews:
        sides = identified(list(reviews.values()), _files(answers))
        for index, (first, second) in zip(reviews, sides, strict=True):
            found[index] = replace(found[index], first=first, second=second)
    return _renamed(found, names or {})


def write_ratings(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records beside the output, force them to the disk and rename: a reader sees all or nothing."""
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    replace_file(path, "".join(lines))


def _files(sources: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Every file, once; a folder gives those that lie in it, at any depth."""
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(
                file
                for file in path.rglob("*")
                if file.is_file()
                and file.suffix.lower() in SUFFIXES
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not inside:
                raise InputError(f"{path} holds no file to read; give {', '.join(SUFFIXES)}.")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"{path} does not exist; give files or folders of ratings.")
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise InputError(f"{file} is given twice; its ratings would count twice.")
        seen.add(file.resolve())
    return files


def _ratings(record: Record, file: Path, place: str) -> list[Rating]:
    if {"first", "second"} <= record.keys():
        made = [_ours(record, place)]
    elif {"answer1_id", "answer2_id"} <= record.keys():
        made = [_review(record, file, place)]
    elif {"model_1", "model_2"} <= record.keys():
        made = _both_orders(record, place)
    elif {"model_a", "model_b"} <= record.keys():
        made = [_vote(record, place)]
    elif "model" in record and "score" in record:
        raise InputError(
            f"{place} scores one answer alone; ratings of pairs are needed (FastChat: --mode pairwise-all)."
        )
    else:
        raise InputError(
            f"{place} is no rating; it needs first, second and label, or model_a, model_b and winner, or what FastChat"
            f" writes, and has {', '.join(map(str, record)) or 'nothing'}."
        )
    for rating in made:
        if rating.first == rating.second:
            raise InputError(f"{place} compares {rating.first!r} with itself.")
    return made


def _ours(record: Record, place: str) -> Rating:
    scores = _scores(record["scores"], place) if record.get("scores") is not None else None
    if record.get("label") is not None:
        label = _label(record["label"], place)
    elif "scores" in record:
        label = _label_of(scores)
    else:
        raise InputError(f"{place} has no label; it is 1, 2, 3 (a tie) or -1 (not parsed).")
    return Rating(
        _name(record, "first", place), _name(record, "second", place), label, scores=scores, **_who(record, place)
    )


def _review(record: Record, file: Path, place: str) -> Rating:
    one, other = _pair_of(file, place)
    score = record.get("score", record.get("label"))
    scores = None
    if isinstance(score, (list, tuple)):
        scores = _scores(score, place)
        label = _label_of(scores)
    else:
        label = _label(score, place)
    return Rating(one, other, label, scores=scores, **_who(record, place))


def _both_orders(record: Record, place: str) -> list[Rating]:
    one, other = _name(record, "model_1", place), _name(record, "model_2", place)
    if "g1_winner" not in record or "g2_winner" not in record:
        raise InputError(f"{place} has no g1_winner and g2_winner, which FastChat's judgements of pairs have.")
    meanings = {"model_1": one, "model_2": other}
    return [
        Rating(first, second, _winner(record[key], first, second, meanings, place, key), **_who(record, place))
        for key, first, second in (("g1_winner", one, other), ("g2_winner", other, one))
    ]


def _vote(record: Record, place: str) -> Rating:
    one, other = _name(record, "model_a", place), _name(record, "model_b", place)
    key = next((key for key in ("winner", "label") if key in record), None)
    if key is None:
        raise InputError(f"{place} has no winner; it is model_a, model_b, the name of one, or tie.")
    meanings = {"model_a": one, "a": one, "model_b": other, "b": other, "1": one, "2": other}
    return Rating(one, other, _winner(record[key], one, other, meanings, place, key), **_who(record, place))


def _winner(said: Any, first: str, second: str, meanings: Mapping[str, str], place: str, key: str) -> int:
    word = "" if said is None else str(said).strip()
    if word in (first, second):
        return FIRST if word == first else SECOND
    meant = meanings.get(word.lower())
    if meant is not None:
        return FIRST if meant == first else SECOND
    if word.lower() in _TIES or word == "3":
        return TIE
    if word.lower() in _DROPS:
        return DROPPED
    raise InputError(f"{place}: the {key} is {word[:80]!r}, which is neither of {first!r} and {second!r}, nor a tie.")


def _label(value: Any, place: str) -> int:
    text = value.strip() if isinstance(value, str) else value
    with_number = isinstance(text, (str, int, float)) and not isinstance(text, bool)
    if with_number and str(text) in ("1", "2", "3", "-1", "1.0", "2.0", "3.0", "-1.0"):
        return int(float(text))
    raise InputError(f"{place}: the label is {str(value)[:80]!r}; it must be 1, 2, 3 (a tie) or -1 (not parsed).")


def _scores(value: Any, place: str) -> tuple[float, float] | None:
    """Two scores; None where there are none, which judges write as -1, -1 or null."""
    numbers = value if isinstance(value, (list, tuple)) else ()
    if len(numbers) == 2 and None in numbers:
        return None
    if len(numbers) != 2 or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        for number in numbers
    ):
        raise InputError(f"{place}: the scores are {str(value)[:80]}; they must be two numbers.")
    if list(numbers) == [-1, -1]:
        return None
    if min(numbers) < 0:
        raise InputError(f"{place}: the scores are {str(value)[:80]}; only -1, -1 (not parsed) may be negative.")
    return float(numbers[0]), float(numbers[1])


def _label_of(scores: tuple[float, float] | None) -> int:
    if scores is None:
        return DROPPED
    return TIE if scores[0] == scores[1] else FIRST if scores[0] > scores[1] else SECOND


def _name(record: Record, key: str, place: str) -> str:
    name = record[key]
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{place}: {key} is {str(name)[:80]!r}; it must be the name of a system.")
    return name.strip()


def _who(record: Record, place: str) -> dict[str, Any]:
    """The prompt, the rater, the turn and the place, as text."""
    prompt = next((record[key] for key in ("id", "question_id", "prompt_id") if record.get(key) is not None), "")
    judge = next((record[key] for key in ("judge", "rater", "judge_model") if record.get(key) is not None), "")
    if isinstance(judge, (list, tuple)) and judge:  # FastChat: the model and the name of its prompt
        judge = judge[0]
    for key, value in (("id", prompt), ("judge", judge)):
        if isinstance(value, (dict, list, tuple, bool)):
            raise InputError(f"{place}: the {key} is {str(value)[:80]}; it must be a text or a number.")
    turn = record.get("turn")
    return {"prompt": str(prompt), "rater": str(judge), "turn": "" if turn is None else str(turn), "place": place}


def _pair_of(file: Path, place: str) -> tuple[str, str]:
    """The systems that a file name speaks of, in its order."""
    stem = re.sub(r"[-_]gpt-?[\w.]*?[-_]reviewer.*$", "", file.stem)
    parts = [_plain(part) for part in re.split(r"[-_]vs[-_]", stem)]
    if len(parts) != 2 or not all(parts):
        raise InputError(
            f"{place} names no systems, and neither does its file; call it ONE-vs-OTHER{file.suffix}, or give records"
            " with first, second and label."
        )
    return parts[0], parts[1]


def _plain(name: str) -> str:
    """The system of a file of answers: without what says that they are answers, and to which prompts."""
    return re.sub(r"^answers?[-_]|[-_]((vicuna|oa|oasst1?)[-_])?generations?\b.*$", "", name)


def _renamed(ratings: list[Rating], names: Mapping[str, str]) -> list[Rating]:
    if not names:
        return ratings
    known = {name for rating in ratings for name in (rating.first, rating.second)}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"No rating speaks of {unknown[0]!r}; the systems are {', '.join(sorted(known))}.")
    after = [names.get(name, name) for name in known]
    if len(set(after)) < len(after):
        raise InputError("Two systems would have the same name; give each its own.")
    return [
        replace(rating, first=names.get(rating.first, rating.first), second=names.get(rating.second, rating.second))
        for rating in ratings
    ]
