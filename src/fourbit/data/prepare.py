"""From what a user names as data to the rows that a trainer takes."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fourbit.data.encode import Encoder, Refused
from fourbit.data.recognise import NO_ANSWER, Example, Recognised, recognise
from fourbit.data.records import Records, read_records
from fourbit.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

__all__ = ["Gathered", "PreparedData", "gather", "nothing_left", "prepare_data"]

MOST_HELD_OUT = 1024  # as the paper does
SHARE_HELD_OUT = 0.05
FEWEST_TO_SPLIT = 20


@dataclass(frozen=True)
class PreparedData:
    """Rows for a trainer.

    Attributes:
        train, evaluation: columns `input_ids`, `labels`, and `place` for where a record was read; evaluation is None
            where nothing is held out.
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
    found = gather(source, encoder, eval_source=eval_source, eval_size=eval_size, seed=seed, split=split, limit=limit)
    sentences = list(found.sentences)
    train_rows = _encoded(found.train, encoder, "examples", sentences)
    held_rows = _encoded(found.held, encoder, "held-out examples", sentences)
    if not train_rows.ids:
        raise InputError(train_rows.nothing_left(source, encoder.max_length, len(found.train)))
    if found.held and not held_rows.ids:
        if eval_source is not None:
            raise InputError(held_rows.nothing_left(eval_source, encoder.max_length, len(found.held)))
        sentences.append("There is no evaluation, as nothing is left of what was held out.")
    return PreparedData(
        train=_dataset(train_rows),
        evaluation=_dataset(held_rows) if held_rows.ids else None,
        sentences=tuple(sentences),
        dropped=found.dropped + train_rows.lost + held_rows.lost,
    )


@dataclass(frozen=True)
class Gathered:
    """Examples to train and to evaluate on, before they are tokenized.

    Attributes:
        train, held: the examples.
        recognised: what the records of each source were found to be: of the data, then of what is evaluated on where
            that is a source of its own.
        sentences: what was recognised, left out and split.
    """

    train: list[Example]
    held: list[Example]
    recognised: tuple[Recognised, ...]
    sentences: tuple[str, ...]

    @property
    def dropped(self) -> int:
        """Records that nothing can be learned from."""
        return sum(found.empty for found in self.recognised)


def gather(
    source: str,
    encoder: Encoder,
    *,
    eval_source: str | None = None,
    eval_size: float | None = None,
    seed: int = 42,
    split: str | None = None,
    limit: int | None = None,
) -> Gathered:
    """Read, recognise and split, and cut plain text that is too long for one example into several.

    Raises:
        InputError: see `prepare_data`.
    """
    records = read_records(source, split=split, limit=limit, texts=True)
    found = _recognised(records)
    sentences = [found.sentence]
    train, held, every = found.examples, [], [found]
    if eval_source is not None:
        every.append(_recognised(read_records(eval_source, texts=True)))
        held = every[-1].examples
        sentences.append(f"Evaluated on: {len(held):,} examples of {eval_source}.")
    elif records.evaluation is not None and eval_size != 0:
        others = recognise(records.evaluation)
        every.append(others)
        size = MOST_HELD_OUT if eval_size is None else _count(eval_size, len(others.examples))
        _, held = _split(others.examples, size, seed)
        sentences.append(f"Held out by {source} itself: {len(held):,} of {len(others.examples):,} examples.")
    elif records.evaluation is None:
        if len(train) < FEWEST_TO_SPLIT:
            train = _continued(train, encoder, sentences)  # a book is one example: some of its pieces are held out
        count = len(train)
        train, held = _split(train, _held_out(eval_size, count), seed)
        if held:
            sentences.append(f"Held out for evaluation, drawn with seed {seed}: {len(held):,} of {count:,} examples.")
    train, held = _continued(train, encoder, sentences), _continued(held, encoder, sentences)
    return Gathered(train, held, tuple(every), tuple(sentences))


def _continued(examples: list[Example], encoder: Encoder, sentences: list[str]) -> list[Example]:
    """The examples, with plain text that is longer than one may be cut into pieces, each an example."""
    found: list[Example] = []
    long = 0
    for example in examples:
        pieces = encoder.pieces(example)
        long += len(pieces) > 1
        found += pieces
    if long:
        sentences.append(
            f"Longer than {encoder.max_length} tokens, so continued in further examples: {long:,} of"
            f" {len(examples):,} texts, now {len(found):,} examples."
        )
    return found


def _recognised(records: Records) -> Recognised:
    found = recognise(records)
    if not found.examples:
        if set(found.left_out) == {NO_ANSWER}:
            raise InputError(f"{records.source}: every one of the {found.records:,} records has an empty answer.")
        reasons = ", ".join(f"{reason} {len(places):,}" for reason, places in found.left_out.items())
        raise InputError(f"{records.source}: all {found.records:,} records are left out, {reasons}.")
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
    places: list[str] = field(default_factory=list)
    truncated: int = 0
    unlearned: int = 0
    wordless: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    @property
    def lost(self) -> int:
        return self.unlearned + self.wordless + self.refused.total()

    def nothing_left(self, source: str, max_length: int, count: int) -> str:
        """See the function."""
        return nothing_left(
            source, max_length, count, unlearned=self.unlearned, wordless=self.wordless, refused=self.refused
        )


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
        rows.ignored.update(row.ignored)
        if row.learned:
            rows.ids.append(np.array(row.input_ids))
            rows.labels.append(np.array(row.labels))
            rows.places.append(example.place)
        elif row.truncated:
            rows.unlearned += 1
        else:
            rows.wordless += 1
    count = f"of {len(examples):,} {what}."
    if rows.truncated:
        sentences.append(f"Cut off at {encoder.max_length} tokens: {rows.truncated:,} {count}")
    if rows.unlearned:
        sentences.append(f"Left out, as their whole answer was cut off: {rows.unlearned:,} {count}")
    if rows.wordless:
        sentences.append(f"Left out, as nothing of their answers is in the template's text: {rows.wordless:,} {count}")
    for why, refused in rows.refused.most_common(3):
        sentences.append(f"Left out, as the chat template refuses them ({why}): {refused:,} {count}")
    for name, ignored in rows.ignored.items():
        sentences.append(f"Ignored, as the chat template has no place for it: `{name}` in {ignored:,} {count}")
    return rows


def nothing_left(
    source: str, max_length: int, count: int, *, unlearned: int, wordless: int, refused: Counter[str]
) -> str:
    """Why nothing can be learned from a source.

    Args:
        count: examples.
        unlearned: how many of them lost their whole answer to `max_length`.
        wordless: of how many the template renders no answer.
        refused: why it renders others not at all, counted.
    """
    if unlearned:
        return (
            f"{source}: no label survives: in {unlearned:,} of {count:,} examples the answer begins after"
            f" `max_length`, which is {max_length} tokens; give more."
        )
    if wordless:
        return (
            f"{source}: no label survives: in {wordless:,} of {count:,} examples the chat template leaves the"
            " whole answer out; give another with `chat_template`."
        )
    return f"{source}: the chat template refuses every example: {refused.most_common(1)[0][0]}."


def _dataset(rows: _Rows) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": rows.ids, "labels": rows.labels, "place": rows.places})
