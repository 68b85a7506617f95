"""What a rater is shown, and what the rater says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["CHOICES", "AlreadyVoted", "Choice", "NotYours", "Progress", "Showing", "Vote"]

Choice = Literal["A", "B", "tie", "both bad"]
"""A is the answer shown first."""

CHOICES: tuple[Choice, ...] = get_args(Choice)


class AlreadyVoted(Exception):
    """There is a vote on this pair, and no other is taken.

    Attributes:
        choice: the vote that stands.
    """

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self.choice = choice


class NotYours(Exception):
    """The rater was never shown this."""


@dataclass(frozen=True)
class Showing:
    """What a rater sees. It holds nothing that says whose answers these are.

    Attributes:
        ticket: by which the rater votes on it; drawn by chance.
        question, first, second: what is shown, in the order that was drawn.
        choice: the rater's vote on it, if there is one already.
    """

    ticket: str
    question: str
    first: str
    second: str
    choice: Choice | None = None


@dataclass(frozen=True)
class Progress:
    """Of a rater: pairs voted on, and pairs that are left."""

    done: int
    left: int


@dataclass(frozen=True)
class Vote:
    """One vote, as it stands.

    Attributes:
        rater: who.
        prompt: the id of the prompt.
        systems: as shown, A first.
        swapped: whether that is the pair's order turned round.
        characters: of the two answers, in that order.
        choice: see `Choice`.
        seconds: from the first showing to the vote, breaks included.
        voted_at: seconds since 1970.
        corrections: how many votes this one has replaced.
    """

    rater: str
    prompt: str | int
    systems: tuple[str, str]
    swapped: bool
    characters: tuple[int, int]
    choice: Choice
    seconds: float
    voted_at: float
    corrections: int
