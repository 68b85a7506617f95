"""From what a user names as data to the rows that a trainer takes."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fourbit.data.encode import IGNORED, Encoder, Refused
from fourbit.data.recognise import Example, Recognised, recognise
from fourbit.data.records import Records, read_records
from fourbit.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

__all__ = ["PreparedData", "prepare_data"]

MOST_HELD_OUT = 1024  # as the paper does
SHARE_HELD_OUT = 0.05
FEWEST_TO_SPLIT = 20


@dataclass(frozen=True)
class PreparedData:
    """Rows for a trainer.

    Attributes:
        train, evaluation: columns `input_ids` and `labels`; evaluation is None where nothing is held out.
        sentences: what was recognised, split, cut and dropped, for the user.
        dropped: records that could not be learned from.
    """

    train: Dataset
    evaluation: Dataset | None
    sentences: tuple[str, ...]
    dropped: int


def prepare_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: str = "answers",
    eval_source: str | None = None,
    eval_size: float | None = None,
    seed: int = 42,
    split: str | None = None,
    limit: int | None = None,
) -> PreparedData:
    """Read, recognise, split, tokenize and mask.

    Args:
        source, split, limit: see `read_records`.
        tokenizer: has a chat template; see `ensure_chat_template`.
        max_length: tokens of an example at most.
        loss_on: "answers" or "all"; see `Encoder`.
        eval_source: what to evaluate on, as a whole. None takes what the source itself holds out, or a part of it.
        eval_size: how much to evaluate on of what the source holds out or, where it holds out nothing, of itself: a
            number of examples, or a share below 1; 0 for none. None takes at most 1,024, and of the source itself no
            more than a twentieth, where there are 20 examples or more.
        seed: draws them.

    Raises:
        InputError: the data cannot be read or are of no known kind, or nothing in them carries loss.
    """
    encoder = Encoder(tokenizer, max_length=max_length, loss_on=loss_on)
    records = read_records(source, split=split, limit=limit)
    found = _recognised(records)
    sentences = [found.sentence]
    train, held, dropped = found.examples, [], found.empty
    if eval_source is not None:
        others = _recognised(read_records(eval_source))
        held, dropped = others.examples, dropped + others.empty
        sentences.append(f"Evaluated on: {len(held):,} examples of {eval_source}.")
    elif records.evaluation is not None and eval_size != 0:
        others = recognise(records.evaluation)
        size = MOST_HELD_OUT if eval_size is None else _count(eval_size, len(others.examples))
        _, held = _split(others.examples, size, seed)
        dropped += others.empty
        sentences.append(f"Held out by {source} itself: {len(held):,} of {len(others.examples):,} examples.")
    elif records.evaluation is None:
        train, held = _split(train, _held_out(eval_size, len(train)), seed)
        if held:
            sentences.append(
                f"Held out for evaluation, drawn with seed {seed}: {len(held):,} of {len(found.examples):,} examples."
            )
    train_rows = _encoded(train, encoder, "examples", sentences)
    held_rows = _encoded(held, encoder, "held-out examples", sentences)
    if not train_rows.ids:
        raise InputError(_nothing_left(source, encoder.max_length, len(train), train_rows))
    if held and not held_rows.ids:
        if eval_source is not None:
            raise InputError(_nothing_left(eval_source, encoder.max_length, len(held), held_rows))
        sentences.append("There is no evaluation, as nothing is left of what was held out.")
    return PreparedData(
        train=_dataset(train_rows),
        evaluation=_dataset(held_rows) if held_rows.ids else None,
        sentences=tuple(sentences),
        dropped=dropped + train_rows.lost + held_rows.lost,
    )


def _recognised(records: Records) -> Recognised:
    found = recognise(records)
    if not found.examples:
        raise InputError(f"{records.source}: every one of the {found.records:,} records has an empty answer.")
    return found


def _count(size: float, of: int) -> int:
    """`eval_size` as a number of examples."""
    if not 0 <= size < math.inf or (size >= 1 and size != int(size)):
        raise InputError(f"`eval_size` is {size}; it must be a number of examples, or a share below 1.")
    return int(size) if size >= 1 else round(size * of)


def _held_out(size: float | None, count: int) -> int:
    """How many examples to hold out of the source itself."""
    if size is None:
        return min(MOST_HELD_OUT, round(SHARE_HELD_OUT * count)) if count >= FEWEST_TO_SPLIT else 0
    held = _count(size, count)
    if held >= count:
        raise InputError(
            f"`eval_size` asks for {held:,} examples, and there are {count:,}; none would be left to train."
        )
    return held


def _split(examples: list[Example], size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """What is trained on, and what is held out, both in their order.

    All examples of a record stay on one side: they share its instruction.
    """
    counts = Counter(example.place for example in examples)
    chosen: set[str] = set()
    missing = size
    for place in random.Random(seed).sample(list(counts), len(counts)):
        if counts[place] <= missing:
            chosen.add(place)
            missing -= counts[place]
    return (
        [example for example in examples if example.place not in chosen],
        [example for example in examples if example.place in chosen],
    )


@dataclass
class _Rows:
    """Examples as token ids (arrays, as a list of ints takes three times the memory), and those that were lost."""

    ids: list[NDArray[np.int64]] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)
    truncated: int = 0
    unlearned: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return self.unlearned + self.refused.total()


def _encoded(examples: list[Example], encoder: Encoder, what: str, sentences: list[str]) -> _Rows:
    """What carries loss; the sentences tell of the rest."""
    rows = _Rows()
    for example in examples:
        try:
            row = encoder.encode(example)
        except Refused as reason:
            rows.refused[str(reason)] += 1
            continue
        rows.truncated += row.truncated
        # The first token is never predicted, so a label on it alone teaches nothing.
        if any(label != IGNORED for label in row.labels[1:]):
            rows.ids.append(np.array(row.input_ids))
            rows.labels.append(np.array(row.labels))
        else:
            rows.unlearned += 1
    count = f"of {len(examples):,} {what}."
    if rows.truncated:
        sentences.append(f"Cut off at {encoder.max_length} tokens: {rows.truncated:,} {count}")
    if rows.unlearned:
        sentences.append(f"Left out, as their whole answer was cut off: {rows.unlearned:,} {count}")
    for why, refused in rows.refused.most_common(3):
        sentences.append(f"Left out, as the chat template refuses them ({why}): {refused:,} {count}")
    return rows


def _nothing_left(source: str, max_length: int, count: int, rows: _Rows) -> str:
    if rows.unlearned:
        return (
            f"{source}: no label survives: in {rows.unlearned:,} of {count:,} examples the answer begins after"
            f" `max_length`, which is {max_length} tokens; give more."
        )
    return f"{source}: the chat template refuses every example: {rows.refused.most_common(1)[0][0]}."


def _dataset(rows: _Rows) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows.ids, "labels": rows.labels})
