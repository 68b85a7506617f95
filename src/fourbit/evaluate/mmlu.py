"""MMLU: which of the letters A to D a model finds likeliest after "Answer:", and the mean over subjects of how often
that is the right one.

The questions of a subject begin with the same worked examples. Their keys and values are computed once, and the
questions are batched behind them: at five shots some nine tenths of the work of a question are saved. A prompt is
tokenized whole, and the shared part is what the prompts have in common as tokens, so that no letter depends on where
the cut is made. A prompt that is too long loses worked examples, never a part of its question.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.evaluate.questions import LETTERS, Exam, Question, render
from fourbit.models.mode import evaluating

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
        letters are not four single tokens.
    """
    length = _settle_length(model, max_length)
    if shots < 0 or batch_size < 1:
        raise InputError(f"There are to be {shots} shots in batches of {batch_size}; give 0 or more, and 1 or more.")
    check_shots(exam, shots)
    letters = _letters(tokenizer)
    answers: dict[str, list[int]] = {}
    started, done, shortened = time.perf_counter(), 0, 0
    with evaluating(model), torch.no_grad():
        for name, questions in exam.questions.items():
            prompts = _prompts(tokenizer, letters.lead, questions, exam.examples.get(name, ())[:shots], length)
            shortened += sum(0 <= prompt.shots < shots for prompt in prompts)
            answers[name] = [-1] * len(questions)
            for places, chosen in _ask(model, prompts, letters.tokens, batch_size):
                for place, letter in zip(places, chosen, strict=True):
                    answers[name][place] = letter
                done += len(places)
                if progress is not None:
                    progress(done, len(exam))
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
    """A question as token ids, behind so many worked examples; -1 where even without any it is too long."""

    place: int
    ids: list[int]
    shots: int


def _settle_length(model: nn.Module, wanted: int | None) -> int:
    config: Any = model.config
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(longest or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if wanted < 2 or (longest is not None and wanted > longest):
        raise InputError(f"The longest prompt is to have {wanted} tokens; this model takes 2 to {longest or 'any'}.")
    return wanted


class _Letters(NamedTuple):
    """How a tokenizer writes the letters after "Answer:".

    Attributes:
        lead: the tokens that all of them begin with: some tokenizers have a token for the space alone.
        tokens: of each letter, what comes then: nearly always a single token.
    """

    lead: list[int]
    tokens: list[list[int]]


def _letters(tokenizer: Any) -> _Letters:
    """How a tokenizer writes an answer.

    Raises:
        InputError: two letters are the same to it.
    """
    stem = tokenizer("Answer:", add_special_tokens=False).input_ids
    whole = [tokenizer(f"Answer: {letter}", add_special_tokens=False).input_ids for letter in LETTERS]
    same = any(found[: len(stem)] != stem or whole.count(found) > 1 for found in whole)
    if same or len(stem) in map(len, whole):
        raise InputError("To this tokenizer the letters A, B, C and D after 'Answer:' are not four different texts.")
    lead = _common_length(whole)
    return _Letters(whole[0][len(stem) : lead], [found[lead:] for found in whole])


def _prompts(
    tokenizer: Any, lead: list[int], questions: Sequence[Question], examples: Sequence[Question], length: int
) -> list[_Prompt]:
    """Each question behind as many of the examples as fit, up to where the letter is to come."""
    end = tokenizer.eos_token_id
    prompts = []
    for place, question in enumerate(questions):
        for shots in range(len(examples), -1, -1):
            ids = tokenizer(render(question, examples[:shots]), verbose=False).input_ids
            ids = [*(ids[:-1] if ids[-1] == end else ids), *lead]  # some tokenizers end every text
            if len(ids) <= length:
                prompts.append(_Prompt(place, ids, shots))
                break
        else:
            prompts.append(_Prompt(place, [], -1))
    return prompts


def _ask(
    model: nn.Module, prompts: Sequence[_Prompt], letters: list[list[int]], batch_size: int
) -> Iterator[tuple[list[int], list[int]]]:
    """The chosen letters of a batch of prompts at a time, those of about one length together."""
    ordered = sorted(prompts, key=lambda prompt: (-prompt.shots, len(prompt.ids)))
    for shots, found in groupby(ordered, key=lambda prompt: prompt.shots):
        group = list(found)
        if shots < 0:
            yield [prompt.place for prompt in group], [-1] * len(group)
            continue
        shared = _common_length([prompt.ids for prompt in group])
        cache = _prefix(model, group[0].ids[:shared])
        if cache is None:
            shared = 0
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            scores = _scores(model, [prompt.ids[shared:] for prompt in batch], letters, shared, cache)
            yield [prompt.place for prompt in batch], scores.argmax(dim=1).tolist()


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, one of each row being left over; 0 for a single row."""
    if len(rows) == 1:
        return 0
    shared = min(map(len, rows)) - 1
    for row in rows[1:]:
        same = (j for j in range(shared) if row[j] != rows[0][j])
        shared = next(same, shared)
    return shared


def _prefix(model: Any, ids: Sequence[int]) -> Any:
    """The keys and values of what all prompts of a group begin with.

    None where that is nothing, or where the model keeps what cannot be had once for many rows: a recurrent state.
    """
    if not ids:
        return None
    rows = torch.tensor([ids], device=model.device)
    cache = model(input_ids=rows, use_cache=True, logits_to_keep=1).get("past_key_values")
    return cache if hasattr(cache, "batch_repeat_interleave") else None


def _scores(
    model: Any, rows: Sequence[Sequence[int]], letters: Sequence[Sequence[int]], shared: int, cache: Any
) -> Tensor:
    """[B, 4] fp32: log p of each letter after each row, but for a constant of the row."""
    if all(len(tokens) == 1 for tokens in letters):
        last = torch.tensor([[len(row) - 1] for row in rows])
        return _logits(model, rows, last, shared, cache)[:, 0, [tokens[0] for tokens in letters]]
    columns = []
    for tokens in letters:
        longer = [[*row, *tokens[:-1]] for row in rows]
        places = torch.tensor([[len(row) - 1 + j for j in range(len(tokens))] for row in rows])
        found = _logits(model, longer, places, shared, cache).log_softmax(dim=-1)
        columns.append(found[:, torch.arange(len(tokens)), tokens].sum(dim=1))
    return torch.stack(columns, dim=1)


def _logits(model: Any, rows: Sequence[Sequence[int]], places: Tensor, shared: int, cache: Any) -> Tensor:
    """[B, P, V] fp32: what is predicted at each of [B, P] places of the rows.

    Rows are padded on the right, where causal attention cannot see it.
    """
    width = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    if cache is not None:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
    positions = torch.arange(shared, shared + width, device=model.device).unsqueeze(0).expand(len(rows), -1)
    mask = torch.ones(len(rows), shared + width, dtype=torch.int64, device=model.device)
    kept, columns = places.to(model.device).unique(return_inverse=True)
    logits: Tensor = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=kept,
    ).logits
    return logits[torch.arange(len(rows), device=model.device).unsqueeze(1), columns].float()
