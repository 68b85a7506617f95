"""An example token by token: what carries loss, what the data says, what the template adds, what is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from fourbit.data.encode import IGNORED, Encoder
from fourbit.data.recognise import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CUT", "DATA", "KINDS_OF_TOKENS", "LOSS", "TEMPLATE", "Coloured", "Token", "colour", "spell"]

LOSS, DATA, TEMPLATE, CUT = "loss", "data", "template", "cut"

KINDS_OF_TOKENS = {
    LOSS: "carries loss: the model learns to say it",
    DATA: "of the data, read without loss",
    TEMPLATE: "added by the template or the tokenizer",
    CUT: "cut off by max_length",
}


@dataclass(frozen=True)
class Token:
    """A token: its id, its text ("" where the next one completes a character), and a key of KINDS_OF_TOKENS."""

    id: int
    text: str
    kind: str


@dataclass(frozen=True)
class Coloured:
    """An example with all its tokens, those that are cut off included.

    Attributes:
        place: where it was read.
        remark: why it is shown.
    """

    place: str
    remark: str
    tokens: tuple[Token, ...]

    def count(self, kind: str) -> int:
        """How many tokens are of a kind."""
        return sum(token.kind == kind for token in self.tokens)


def colour(example: Example, encoder: Encoder, *, max_length: int, remark: str = "") -> Coloured:
    """Say of each token what it is.

    Args:
        encoder: with a `max_length` that cuts nothing.
        max_length: what is cut at.

    Raises:
        Refused: the template cannot render the example.
    """
    row = encoder.encode(example)
    texts = spell(encoder.tokenizer, row.input_ids)
    said = _said(example, "".join(texts))
    tokens = []
    for number, (token, label, text, end) in enumerate(
        zip(row.input_ids, row.labels, texts, accumulate(map(len, texts)), strict=True)
    ):
        if number >= max_length:
            kind = CUT
        elif label != IGNORED and number > 0:  # a first token is never predicted
            kind = LOSS
        else:
            kind = DATA if any(begin < end and end - len(text) < stop for begin, stop in said) else TEMPLATE
        tokens.append(Token(token, text, kind))
    return Coloured(example.place, remark, tuple(tokens))


def _said(example: Example, text: str) -> list[tuple[int, int]]:
    """Where the words of the data stand in the text, in their order."""
    spans: list[tuple[int, int]] = []
    contents = [message["content"].strip() for message in example.messages or ()] or [(example.text or "").strip()]
    begin = 0
    for content in contents:
        at = text.find(content, begin) if content else -1
        if at >= 0:
            begin = at + len(content)
            spans.append((at, begin))
    return spans


def spell(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; together they are the whole text.

    A token is decoded behind a few others, as vocabularies write no space in front of a text's first word, and a
    character of several tokens is the last one's.
    """
    texts: list[str] = []
    before, read = 0, 0
    for number in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[before:read], clean_up_tokenization_spaces=False)
        now = tokenizer.decode(ids[before:number], clean_up_tokenization_spaces=False)
        if now.endswith("\ufffd") and number < len(ids) and number - read < 4:
            texts.append("")
            continue
        texts.append(now.removeprefix(known))
        before, read = read, number
    return texts
