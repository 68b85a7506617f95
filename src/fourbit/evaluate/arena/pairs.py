"""The pairs of answers that are compared, and the turn in which raters meet them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourbit.evaluate.answers import pair_systems, read_questions, read_systems, same_prompts

__all__ = ["Pair", "PairSet", "in_turn", "plan_pairs"]


@dataclass(frozen=True)
class Pair:
    """Two systems' answers to one prompt.

    Attributes:
        prompt: its id.
        question: what was asked.
        systems: the names of the two.
        answers: their texts, in the order of the names.
    """

    prompt: str | int
    question: str
    systems: tuple[str, str]
    answers: tuple[str, str]


@dataclass(frozen=True)
class PairSet:
    """What is compared.

    Attributes:
        systems: the names.
        pairs: each pair of systems on each prompt. Empty where the answers are made while people ask.
        live: whether they are.
        sentences: what a person should know.
    """

    systems: tuple[str, ...]
    pairs: tuple[Pair, ...] = ()
    live: bool = False
    sentences: tuple[str, ...] = ()

    @property
    def prompts(self) -> int:
        """How many."""
        return len({pair.prompt for pair in self.pairs})

    @property
    def fingerprint(self) -> str:
        """A hash of what is compared, whatever the order in which the files were given."""
        digests = sorted(
            _digest([json.dumps(pair.prompt), pair.question, sorted(zip(pair.systems, pair.answers, strict=True))])
            for pair in self.pairs
        )
        return _digest([self.live, sorted(self.systems), digests])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def plan_pairs(
    sources: Sequence[str], *, reference: str | None = None, questions: str | Path | None = None, common: bool = False
) -> PairSet:
    """Read files of answers and pair them.

    Args:
        sources: see `read_systems`.
        reference: see `pair_systems`.
        questions, common: see `same_prompts`.

    Raises:
        InputError: says what is wrong with the answers.
    """
    systems = read_systems(sources)
    chosen = pair_systems(systems, reference)
    asked = same_prompts(systems, read_questions(questions) if questions else None, common=common)
    pairs = [
        Pair(
            prompt,
            _text(question),
            (one.name, other.name),
            (_text(one.answers[key].text), _text(other.answers[key].text)),
        )
        for key, (prompt, question) in asked.items()
        for one, other in chosen
    ]
    sentences = []
    if common and (left := len({key for system in systems for key in system.answers}) - len(asked)):
        sentences.append(f"{left} prompts are left out, as not all systems answer them.")
    if equal := sum(pair.answers[0].strip() == pair.answers[1].strip() for pair in pairs):
        sentences.append(
            f"{equal:,} of the {len(pairs):,} pairs hold the same answer twice; they are shown all the same."
        )
    return PairSet(tuple(system.name for system in systems), tuple(pairs), sentences=tuple(sentences))


def _text(given: str) -> str:
    return given.encode("utf-8", "replace").decode()  # half a surrogate pair is no text for SQLite, nor for a browser


def in_turn(pairs: Sequence[Pair], *, chance: random.Random) -> list[Pair]:
    """Shuffle pairs so that whoever stops early has seen every two systems, and every prompt, about as often.

    Each round has every two systems once, in an order of its own; their prompts are one shuffled list, which each two
    systems begin at another place.

    Args:
        pairs: every two systems on the same prompts.
        chance: what shuffles.
    """
    by_systems: dict[tuple[str, str], dict[str | int, Pair]] = {}
    for pair in pairs:
        by_systems.setdefault(pair.systems, {})[pair.prompt] = pair
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    chance.shuffle(prompts)
    begins = {systems: number * len(prompts) // len(by_systems) for number, systems in enumerate(by_systems)}
    turns = []
    for round_ in range(len(prompts)):
        group = list(by_systems)
        chance.shuffle(group)
        turns += [by_systems[systems][prompts[(begins[systems] + round_) % len(prompts)]] for systems in group]
    return turns
