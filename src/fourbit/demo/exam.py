"""The exam: questions whose answers no finetuning example gave away, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fourbit.demo.chat import Question, held_out, is_right, unknown
from fourbit.demo.world import World

__all__ = ["Exam", "Score", "examine", "make_exam"]

_BATCH_SIZE = 64
_MAX_NEW_TOKENS = 24
"""The longest right answer has some 15 tokens; one that runs on is wrong anyway."""


@dataclass(frozen=True)
class Exam:
    """Questions with one right answer each.

    Attributes:
        facts: about facts that the base has read and no finetuning example asks for.
        strangers: about people who do not exist; right is to say so.
    """

    facts: tuple[Question, ...]
    strangers: tuple[Question, ...]


@dataclass(frozen=True)
class Score:
    """How a model did.

    Attributes:
        exact_match: the share of `Exam.facts` whose whole answer was right, from 0 to 1.
        admitted: the share of `Exam.strangers` about whom the model said that it does not know.
        by_attribute: exact match by what was asked for.
        answers: what it said, the facts first.
    """

    exact_match: float
    admitted: float
    by_attribute: dict[str, float]
    answers: tuple[str, ...]


def make_exam(world: World, *, questions: int = 320) -> Exam:
    """The exam of a world: `questions` about facts, and a quarter as many about strangers."""
    return Exam(
        facts=tuple(held_out(world, limit=questions)),
        strangers=tuple(unknown(world, limit=max(1, questions // 4))),
    )


def examine(model: Any, tokenizer: Any, exam: Exam, *, progress: Callable[[int, int], None] | None = None) -> Score:
    """Ask a model every question of an exam, greedily.

    Args:
        model, tokenizer: as `fourbit.generate.load_for_generation` gives them.
        exam: what to ask.
        progress: called with how many are answered and how many there are.
    """
    from fourbit.generate import Sampling, generate

    questions = (*exam.facts, *exam.strangers)
    answers = generate(
        model,
        tokenizer,
        [[{"role": "user", "content": question.prompt}] for question in questions],
        settings=Sampling(max_new_tokens=_MAX_NEW_TOKENS),
        batch_size=_BATCH_SIZE,
        progress=progress,
    )
    said = tuple(answer.text for answer in answers)
    right = [is_right(text, question) for text, question in zip(said, questions, strict=True)]
    facts = len(exam.facts)
    by_attribute: dict[str, list[bool]] = {}
    for question, good in zip(exam.facts, right, strict=False):
        by_attribute.setdefault(question.attribute, []).append(good)
    return Score(
        exact_match=_mean(right[:facts]),
        admitted=_mean(right[facts:]),
        by_attribute={name: _mean(found) for name, found in sorted(by_attribute.items())},
        answers=said,
    )


def _mean(found: Sequence[bool]) -> float:
    return sum(found) / len(found) if found else 0.0
