"""An answer while it grows, token by token: its text, and whether it has come to an end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fourbit.generate.conversation import Prompt
from fourbit.generate.endings import Endings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Growing", "Pieces"]


class Pieces:
    """Text out of tokens one at a time.

    A token's text depends on those before it: tokenizers drop the space before a text's first word, and a character may
    be spread over several tokens. So the tokens of the last piece are decoded with and without the new one, and the
    difference is its text; a character that is not complete is held until it is.

    Args:
        tokenizer: of the model.
        before: ids of the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)  # from where a piece began: in the middle of a character they would not decode
        self._given = len(self._ids)  # those whose text is out

    def push(self, token: int) -> str:
        """The text that one more token completes; often a word, sometimes nothing."""
        self._ids.append(token)
        new = self._new_text()
        if not new or new.endswith("�"):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return new

    def rest(self) -> str:
        """The text of tokens that completed no character."""
        new = self._new_text()
        self._given = len(self._ids)
        return new

    def _new_text(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._given])) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Growing:
    """The answer to one prompt, fed with tokens until `finish_reason` is set.

    Attributes:
        ids: of the answer so far, with the token that ended it.
        finish_reason: "stop" (the end of a turn or text, or a stop string), "length", or None while it grows.
        limit: the most tokens.

    Args:
        endings: what ends it.
        limit: see above.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, endings: Endings, limit: int) -> None:
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self._pieces = Pieces(tokenizer, prompt.ids)
        self._chat, self._end_ids, self._stop, self.limit = prompt.chat, endings.ids, endings.stop, limit
        self._text = ""

    @property
    def text(self) -> str:
        """The answer so far; of an assistant's turn without the white space around it."""
        return self._text.strip() if self._chat else self._text

    @property
    def settled(self) -> str:
        """The part of `text` that no further token can take back: all but what may become a stop string."""
        text = self._text
        if self.finish_reason is None:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        return text.strip() if self._chat else text

    def push(self, token: int) -> None:
        """Take one more token."""
        self.ids.append(token)
        if token in self._end_ids:
            self._finish("stop")
            return
        self._append(self._pieces.push(token))
        if self.finish_reason is None and len(self.ids) >= self.limit:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self._append(self._pieces.rest())
        self.finish_reason = self.finish_reason or reason

    def _append(self, piece: str) -> None:
        seen = len(self._text)
        self._text += piece
        places = [self._text.find(stop, max(0, seen - len(stop) + 1)) for stop in self._stop]
        if found := [place for place in places if place >= 0]:
            self._text = self._text[: min(found)]
            self.finish_reason = "stop"


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
