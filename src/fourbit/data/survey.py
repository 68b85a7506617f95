"""Every example measured as the trainer would see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fourbit.data.duplicates import Duplicates, find_duplicates
from fourbit.data.encode import IGNORED, Encoder, Refused
from fourbit.data.prepare import Gathered
from fourbit.data.recognise import Example
from fourbit.data.templates import end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Measured", "Progress", "Survey", "survey_examples", "uncut_encoder"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""

UNCUT = 2**62


@dataclass(frozen=True)
class Measured:
    """What becomes of an example.

    Attributes:
        example: itself.
        tokens: before anything is cut off; 0 where the template refuses it.
        learned: tokens that carry loss, after the cut.
        lost: tokens that would carry loss, and are cut off.
        ended: whether the last token with loss, before the cut, ends a turn.
        begun_twice: whether it begins with two BOS tokens.
        unknown: how many tokens are the vocabulary's unknown one.
        refused: why the template cannot render it; "" where it can.
        ignored: what the template has no place for; see `Encoded`.
    """

    example: Example
    tokens: int
    learned: int = 0
    lost: int = 0
    ended: bool = False
    begun_twice: bool = False
    unknown: int = 0
    refused: str = ""
    ignored: tuple[str, ...] = ()

    @property
    def survives(self) -> bool:
        """Whether anything is learned from it."""
        return self.learned > 0


@dataclass(frozen=True)
class Survey:
    """Everything that was measured; the checks of `checks` read it.

    Attributes:
        tokenizer: with its chat template and pad token.
        encoder: which cuts nothing.
        max_length: of the rows that the trainer would take.
        gathered: the examples, and what was left out before.
        train, held: one for each example.
        duplicates: among the training examples, and the held-out ones behind them.
    """

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    max_length: int
    gathered: Gathered
    train: list[Measured]
    held: list[Measured]
    duplicates: Duplicates

    @property
    def every(self) -> list[Measured]:
        """Both, the training examples first."""
        return self.train + self.held


def survey_examples(
    gathered: Gathered,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: str = "answers",
    progress: Progress | None = None,
) -> Survey:
    """Measure them, and find those that are there twice.

    Args:
        tokenizer: has a chat template and a pad token.
        max_length, loss_on: see `Encoder`.
        progress: is told how far it is.
    """
    tell = progress or (lambda *_: None)
    encoder = uncut_encoder(tokenizer, loss_on=loss_on)
    examples = gathered.train + gathered.held
    measured = list(_measure(examples, encoder, max_length, tell))
    texts = [_whole(example) for example in examples]
    return Survey(
        tokenizer=tokenizer,
        encoder=encoder,
        max_length=max_length,
        gathered=gathered,
        train=measured[: len(gathered.train)],
        held=measured[len(gathered.train) :],
        duplicates=find_duplicates(texts, progress=lambda done, of: tell("looking for duplicates", done, of)),
    )


def uncut_encoder(tokenizer: PreTrainedTokenizerBase, *, loss_on: str) -> Encoder:
    """One that cuts nothing off, to see what would be."""
    return Encoder(tokenizer, max_length=UNCUT, loss_on=loss_on)


def _measure(examples: list[Example], encoder: Encoder, max_length: int, tell: Progress) -> Iterator[Measured]:
    tokenizer = encoder.tokenizer
    ends = end_of_turn(tokenizer) if tokenizer.chat_template else [tokenizer.eos_token_id]
    ids = {end for end in ends if isinstance(end, int)}
    words = tuple(end for end in ends if isinstance(end, str))
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    for number, example in enumerate(examples):
        if number % 100 == 0:
            tell("measuring", number, len(examples))
        try:
            row = encoder.encode(example)
        except Refused as reason:
            yield Measured(example, 0, refused=str(reason))
            continue
        carries = [label for label in row.labels[1:] if label != IGNORED]
        kept = row.labels[1:max_length]
        learned = len(kept) - kept.count(IGNORED)
        ended = bool(carries) and carries[-1] in ids
        if carries and words and not ended:
            ended = str(tokenizer.decode(carries[-32:])).rstrip().endswith(words)
        yield Measured(
            example,
            tokens=len(row.input_ids),
            learned=learned,
            lost=len(carries) - learned,
            ended=ended,
            begun_twice=bos is not None and row.input_ids[:2] == [bos, bos],
            unknown=0 if unknown is None else row.input_ids.count(unknown),
            ignored=row.ignored,
        )
    tell("measuring", len(examples), len(examples))


def _whole(example: Example) -> str:
    """All that is said in it, for comparing."""
    if example.messages is None:
        return example.text or ""
    return "\n".join(f"{turn['role']} {turn['content']} {turn.get('tool_calls', '')}" for turn in example.messages)
