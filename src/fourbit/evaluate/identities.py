"""Whose answer is it? Systems by the ids of their answers, where ratings carry them only in the name of the file."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from fourbit.data.records import read_records
from fourbit.errors import InputError

__all__ = ["identified"]

_log = logging.getLogger(__name__)

Review = tuple[str, str, str, str, str]
"""The ids of the answer shown first and second, the two systems that the file names, and the place of the record."""


def identified(reviews: Sequence[Review], answers: Sequence[Path] = ()) -> list[tuple[str, str]]:
    """The systems of each review in the order of the presentation.

    An id belongs to a system that is named by all files it occurs in; where that leaves one system, it is known, and so
    is the other side of each of its reviews. What stays unknown is taken in the order of the file name, with a warning.

    Args:
        reviews: see `Review`.
        answers: files of answers with ids, each of one system: the name of the file or of its model tells which.

    Raises:
        InputError: the ids of a review contradict the name of its file.
    """
    pairs = [frozenset(review[2:4]) for review in reviews]
    candidates: dict[str, frozenset[str]] = {}
    owners = _owners(answers)
    for (one, other, *_, place), pair in zip(reviews, pairs, strict=True):
        if one == other:
            raise InputError(f"{place} has the same answer id twice.")
        for answer in (one, other):
            named = _named(owners.get(answer, ()), pair)
            candidates[answer] = candidates.get(answer, pair) & (named or pair)
            if not candidates[answer]:
                raise InputError(
                    f"{place}: the answer id {answer} belongs to neither of {' and '.join(sorted(pair))}; is the file"
                    " misnamed?"
                )
    _narrow(reviews, candidates)
    return _sides(reviews, candidates)


def _narrow(reviews: Sequence[Review], candidates: dict[str, frozenset[str]]) -> None:
    """Where one side of a review is known, the other is the other system; until nothing more follows."""
    changed = True
    while changed:
        changed = False
        for one, other, *_, place in reviews:
            for known, unknown in ((one, other), (other, one)):
                if len(candidates[known]) == 1 and candidates[known] & candidates[unknown]:
                    candidates[unknown] -= candidates[known]
                    changed = True
                    if not candidates[unknown]:
                        raise InputError(f"{place}: both answer ids belong to {min(candidates[known])}.")


def _sides(reviews: Sequence[Review], candidates: dict[str, frozenset[str]]) -> list[tuple[str, str]]:
    found, guessed = [], 0
    for one, other, first, second, _ in reviews:
        if len(candidates[one]) == 1 and len(candidates[other]) == 1:
            found.append((min(candidates[one]), min(candidates[other])))
        else:
            found.append((first, second))
            guessed += 1
    if guessed:
        _log.warning(
            "%s of %s ratings name their systems in the name of the file only, and nothing says whose their answer ids"
            " are: taken in the order of the name. Files of answers with these ids would tell.",
            f"{guessed:,}",
            f"{len(reviews):,}",
        )
    return found


def _owners(answers: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Answer id -> what its system is called: in the record, and by the file."""
    owners: dict[str, tuple[str, ...]] = {}
    for file in answers:
        records = read_records(file)
        for record in records.rows:
            if record.get("answer_id") is not None:
                owners[str(record["answer_id"])] = (str(record.get("model_id", "")), file.stem)
    return owners


def _named(labels: Sequence[str], pair: frozenset[str]) -> frozenset[str]:
    """The systems of a pair that a label speaks of; the longer name wins where one is a part of the other."""
    texts = [_letters(label) for label in labels]
    named = [name for name in pair if any(_letters(name) in text for text in texts)]
    if len(named) == 2:
        longer = max(named, key=len)
        return frozenset([longer]) if all(_letters(name) in _letters(longer) for name in named) else frozenset()
    return frozenset(named)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
