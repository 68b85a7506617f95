"""Votes as ratings: the records that `fourbit elo` and `fourbit agreement` read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fourbit.errors import OutputExists
from fourbit.evaluate.arena.ballots import Choice, Vote
from fourbit.evaluate.ratings import FIRST, SECOND, TIE, Rating, write_ratings

__all__ = ["LABELS", "check_export", "export_votes", "rating", "record"]

LABELS: dict[Choice, int] = {"A": FIRST, "B": SECOND, "tie": TIE, "both bad": TIE}


def rating(vote: Vote) -> Rating:
    """The vote as a rating. Both bad is a tie, as neither answer is better."""
    return Rating(*vote.systems, LABELS[vote.choice], prompt=str(vote.prompt), rater=vote.rater)


def record(vote: Vote) -> dict[str, Any]:
    """The vote as a record of a file of ratings."""
    first, second = vote.systems
    return {
        "id": vote.prompt,
        "first": first,
        "second": second,
        "order": 2 if vote.swapped else 1,
        "label": LABELS[vote.choice],
        "vote": vote.choice,
        "rater": vote.rater,
        "characters": list(vote.characters),
        "seconds": round(vote.seconds, 1),
        "corrections": vote.corrections,
        "voted_at": datetime.fromtimestamp(vote.voted_at, timezone.utc).isoformat(timespec="seconds"),
    }


def export_votes(votes: Iterable[Vote], path: Path) -> None:
    """Write votes as ratings, all or nothing.

    Raises:
        OutputExists: see `check_export`.
    """
    check_export(path)
    write_ratings(path, map(record, votes))


def check_export(path: Path) -> None:
    """Refuse to replace what is no earlier export.

    Raises:
        OutputExists: it is there, and something else.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputExists(f"{path} is no ordinary file; choose another output.")
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            known = {"first", "second", "label", "vote", "rater"} <= json.loads(line).keys()
        except (ValueError, AttributeError, RecursionError):
            known = False
        if not known:
            raise OutputExists(f"{path} exists and holds no votes of fourbit arena; choose another output.")
