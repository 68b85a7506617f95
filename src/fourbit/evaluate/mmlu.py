"""MMLU: which of the letters A to D a model finds likeliest after "Answer:", and the mean over subjects of how often
that is the right one.

The questions of a subject begin with the same worked examples, whose keys and values are computed once (see
`continuations`): at five shots some nine tenths of the work of a question are saved. A prompt is tokenized whole, and
what is shared is what prompts have in common as tokens, so that no letter depends on where the cut is made. A prompt
that is too long loses worked examples, never a part of its question.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from fourbit.errors import InputError
from fourbit.evaluate.continuations import Asked, score_continuations
from fourbit.evaluate.questions import LETTERS, Exam, Question, render

__all__ = ["DEFAULT_LENGTH", "Mmlu", "check_shots", "measure_mmlu"]

DEFAULT_LENGTH = 2048
"""Tokens of a prompt at most, as in the paper's evaluation."""


@dataclass(frozen=True)
class Mmlu:
    """What a model scored.

    Attributes:
        answers: subject -> for each of its questions the index of the chosen letter; -1 where even the bare question
            is too long, which counts as wrong.
        right: subject -> the index of the right one.
        shots: worked examples before a question, where they fit.
        shortened: questions before which fewer stand.
        seconds: spent in the model.
    """

    answers: dict[str, list[int]] = field(repr=False)
    right: dict[str, list[int]] = field(repr=False)
    shots: int
    shortened: int
    seconds: float

    @property
    def questions(self) -> int:
        """How many there are."""
        return sum(map(len, self.right.values()))

    @property
    def too_long(self) -> int:
        """Questions that the model could not be asked."""
        return sum(chosen == -1 for answers in self.answers.values() for chosen in answers)

    @property
    def subjects(self) -> dict[str, float]:
        """Subject -> the share of its questions that were answered right."""
        return {
            name: sum(map(int.__eq__, self.answers[name], right)) / len(right) for name, right in self.right.items()
        }

    @property
    def accuracy(self) -> float:
        """The mean over subjects, each counting the same."""
        return math.fsum(self.subjects.values()) / len(self.right)

    @property
    def question_accuracy(self) -> float:
        """The mean over questions, as lm-evaluation-harness gives it for all of MMLU."""
        return (
            sum(sum(map(int.__eq__, self.answers[name], right)) for name, right in self.right.items()) / self.questions
        )

    @property
    def standard_error(self) -> float:
        """Of the accuracy, the questions of each subject being drawn independently."""
        variances = [share * (1 - share) / len(self.right[name]) for name, share in self.subjects.items()]
        return math.sqrt(math.fsum(variances)) / len(variances)


def measure_mmlu(
    model: nn.Module,
    tokenizer: Any,
    exam: Exam,
    *,
    shots: int = 5,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mmlu:
    """Ask a causal language model every question.

    Args:
        model: of transformers, quantized or not, with an adapter or not. Run in `eval()`; left as it was found.
        tokenizer: of transformers, the model's own.
        exam: see `read_exam`.
        shots: worked examples before each question.
        batch_size: questions in one forward pass.
        max_length: tokens of a prompt, by default what the model was made for, at most `DEFAULT_LENGTH`.
        progress: called with the questions answered and the questions in all, after each forward pass.

    Raises:
        InputError: a setting out of range, a subject without enough worked examples, or a tokenizer to which the four
        letters are not four different texts.
    """
    length = _settle_length(model, max_length)
    if shots < 0 or batch_size < 1:
        raise InputError(f"There are to be {shots} shots in batches of {batch_size}; give 0 or more, and 1 or more.")
    check_shots(exam, shots)
    letters = _letters(tokenizer)
    started = time.perf_counter()
    answers = {name: [-1] * len(questions) for name, questions in exam.questions.items()}
    asked: list[Asked] = []
    places: list[tuple[str, int]] = []
    shortened = 0
    for name, questions in exam.questions.items():
        worked = exam.examples.get(name, ())[:shots]
        for place, prompt in enumerate(_prompts(tokenizer, questions, worked, length - max(map(len, letters)) + 1)):
            if prompt is not None:
                asked.append(Asked(prompt.ids, letters))
                places.append((name, place))
                shortened += prompt.shots < shots
    for number, letter in _answered(model, asked, batch_size, progress, len(exam)):
        name, place = places[number]
        answers[name][place] = letter
    right = {name: [LETTERS.index(question.answer) for question in found] for name, found in exam.questions.items()}
    return Mmlu(answers, right, shots, shortened, time.perf_counter() - started)


def check_shots(exam: Exam, shots: int) -> None:
    """See that every subject has so many worked examples.

    Raises:
        InputError: names the first that has not.
    """
    for name in exam.questions:
        if len(exam.examples.get(name, ())) < shots:
            raise InputError(
                f"{exam.source} has {len(exam.examples.get(name, ()))} worked examples of {name}, and {shots} are to"
                " stand before each question; give fewer shots, or a folder with dev/*.csv."
            )


class _Prompt(NamedTuple):
    """A question as token ids, behind so many worked examples."""

    ids: npt.NDArray[np.int32]
    shots: int


def _settle_length(model: nn.Module, wanted: int | None) -> int:
    config: Any = model.config
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(longest or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if wanted < 2 or (longest is not None and wanted > longest):
        raise InputError(f"The longest prompt is to have {wanted} tokens; this model takes 2 to {longest or 'any'}.")
    return wanted


def _letters(tokenizer: Any) -> list[list[int]]:
    """How a tokenizer writes each letter after "Answer:": nearly always as a single token.

    Raises:
        InputError: two letters are the same to it.
    """
    stem = tokenizer("Answer:", add_special_tokens=False).input_ids
    whole = [tokenizer(f"Answer: {letter}", add_special_tokens=False).input_ids for letter in LETTERS]
    same = any(found[: len(stem)] != stem or whole.count(found) > 1 for found in whole)
    if same or len(stem) in map(len, whole):
        raise InputError("To this tokenizer the letters A, B, C and D after 'Answer:' are not four different texts.")
    return [found[len(stem) :] for found in whole]


def _prompts(
    tokenizer: Any, questions: Sequence[Question], examples: Sequence[Question], length: int
) -> list[_Prompt | None]:
    """Each question behind as many of the examples as fit, up to where the letter is to come; None where none fits."""
    prompts: list[_Prompt | None] = [None] * len(questions)
    waiting = list(range(len(questions)))
    for shots in range(len(examples), -1, -1):
        texts = [render(questions[place], examples[:shots]) for place in waiting]
        for place, ids in zip(waiting, _encoded(tokenizer, texts), strict=True):
            if len(ids) <= length:
                prompts[place] = _Prompt(np.asarray(ids, dtype=np.int32), shots)
        waiting = [place for place in waiting if prompts[place] is None]
    return prompts


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts that are to go on."""
    if not texts:
        return []
    end = tokenizer.eos_token_id
    found = tokenizer(texts, verbose=False).input_ids
    return [ids[:-1] if ids[-1] == end else ids for ids in found]  # some tokenizers end every text


def _answered(
    model: nn.Module,
    asked: Sequence[Asked],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    total: int,
) -> Iterator[tuple[int, int]]:
    """(number, letter): the likeliest letter for each of what was asked."""
    scores: dict[int, list[float]] = {}
    left = [len(LETTERS)] * len(asked)
    done = total - len(asked)
    for batch in score_continuations(model, asked, batch_size=batch_size):
        for scored in batch:
            scores.setdefault(scored.place, [0.0] * len(LETTERS))[scored.which] = scored.log_likelihood
            left[scored.place] -= 1
            if not left[scored.place]:
                found = scores.pop(scored.place)
                done += 1
                yield scored.place, found.index(max(found))
        if progress is not None:
            progress(done, total)
