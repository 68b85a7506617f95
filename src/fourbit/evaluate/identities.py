"""Whose answer is it? Systems by the ids of their answers, where ratings carry them only in the name of the file."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fourbit.data.records import read_records
from fourbit.errors import InputError

__all__ = ["Review", "identified"]

_log = logging.getLogger(__name__)

_KNOWN = 1_000_000
"""What the word of a file of answers counts, in files of ratings."""

Support = Mapping[str, Mapping[str, int]]
"""Answer id -> system -> how many files with this id name the system."""


class Review(NamedTuple):
    """One record: the ids of the answers in the order of presentation, and the two systems that its file names."""

    one: str
    other: str
    first: str
    second: str
    file: Path


def identified(reviews: Sequence[Review], answers: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """The systems of each review in the order of the presentation.

    An id belongs to a system that many files with this id name: a review is read the way round that more files speak
    for. No more can be asked, since two systems that gave the same answer share an id. Where nothing speaks for either
    way, the other reviews of the file decide, and if they do not, the name of the file does, with a warning.

    Args:
        reviews: of all files.
        answers: files of answers with ids, each of one system: the name of the file or of its model tells which.

    Raises:
        InputError: the ids in a file are those of other systems than its name says.
    """
    support = _support(reviews, answers)
    _check_names(reviews, support)
    leanings = [_leaning(review, support) for review in reviews]
    of_file: Counter[Path] = Counter()
    for review, leaning in zip(reviews, leanings, strict=True):
        of_file[review.file] += leaning
    found, guessed = [], 0
    for review, leaning in zip(reviews, leanings, strict=True):
        decided = leaning or of_file[review.file]
        found.append((review.second, review.first) if decided < 0 else (review.first, review.second))
        guessed += decided == 0
    if guessed:
        _log.warning(
            "%s of %s ratings name their systems in the name of the file only, and nothing says whose their answer ids"
            " are: taken in the order of the name. Files of answers with these ids (`--answers`) would tell.",
            f"{guessed:,}",
            f"{len(reviews):,}",
        )
    return found


def _support(reviews: Sequence[Review], answers: Sequence[Path]) -> Support:
    files: dict[str, dict[Path, tuple[str, str]]] = defaultdict(dict)
    for review in reviews:
        for answer in (review.one, review.other):
            files[answer][review.file] = (review.first, review.second)
    support = {answer: Counter(name for pair in named.values() for name in pair) for answer, named in files.items()}
    systems = {name for review in reviews for name in (review.first, review.second)}
    for file in answers:
        for record in read_records(file).rows:
            answer = str(record.get("answer_id"))
            if answer in support and (owner := _meant(systems, (str(record.get("model_id", "")), file.stem))):
                support[answer][owner] += _KNOWN
    return support


def _leaning(review: Review, support: Support) -> int:
    """Above 0: the presentation is in the order of the file name; below: the other way round; 0: nothing tells."""
    one, other = support[review.one], support[review.other]
    return one[review.first] + other[review.second] - one[review.second] - other[review.first]


def _check_names(reviews: Sequence[Review], support: Support) -> None:
    """Refuse a file most of whose ids are better known from others, which name neither of its systems."""
    foreign: Counter[Path] = Counter()
    size: Counter[Path] = Counter()
    for review in reviews:
        size[review.file] += 1
        for answer in (review.one, review.other):
            named = support[answer]
            own = max(named[review.first], named[review.second])
            if max(named.values()) > 2 * own:
                foreign[review.file] += 1
                break
    for file, count in foreign.items():
        if 2 * count > size[file]:
            raise InputError(f"{file}: its answer ids are not those of the systems in its name; is it misnamed?")


def _meant(systems: set[str], labels: Sequence[str]) -> str | None:
    """The system that a file of answers is of: the longest whose name is part of a label; None where none is."""
    texts = [_letters(label) for label in labels]
    named = [name for name in systems if any(_letters(name) in text for text in texts)]
    return max(named, key=lambda name: (len(name), name), default=None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
