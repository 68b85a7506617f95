"""A conversation as token ids, and which of them carry loss: what the model itself has to say, and nothing else.

That is everything from where a generation would begin up to the end of the turn, in every answer. Where that lies is
read off the rendered text, for any template: the conversation is rendered once as it is and once with each answer
replaced by a mark, and what stands around the marks is looked up in the first. The text is tokenized as a whole, as it
will be for generation, and a token carries loss where it overlaps an answer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from fourbit.data.recognise import Example
from fourbit.data.templates import Refused, Turn, closing, inner_closing, lead, left_out, render_turns
from fourbit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "LOSS_ON", "Encoded", "Encoder", "Refused"]

IGNORED = -100
"""The label of a token without loss, as torch has it."""

LOSS_ON = ("answers", "all")

SPARE = 4
"""Tokens that a piece of a text leaves free: BOS, EOS, and what a vocabulary puts in front of a text."""

Turns: TypeAlias = Sequence[Turn]
Span: TypeAlias = tuple[int, int]

_THOUGHT = "</think>"
"""Ends a thought inside an answer. Templates keep it, write it anew, or leave it out of all answers but the last."""


@dataclass(frozen=True)
class Encoded:
    """An example as the model sees it.

    Attributes:
        input_ids: T token ids.
        labels: T; the id itself where the token carries loss, else IGNORED. The model shifts them.
        truncated: whether its end was cut off.
        ignored: what the example has and the template has no place for: tools, tool_calls, reasoning_content.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    ignored: tuple[str, ...] = ()

    @property
    def learned(self) -> int:
        """How many tokens carry loss. The first is never predicted, so a label on it alone teaches nothing."""
        return len(self.labels) - 1 - self.labels[1:].count(IGNORED) if self.labels else 0


class Encoder:
    """Turns examples into token ids and labels.

    Args:
        tokenizer: has a chat template; see `ensure_chat_template`.
        max_length: tokens of an example at most; its end is cut off.
        loss_on: "answers", or "all": the user's turns and the headers, too.

    Raises:
        InputError: `loss_on` is unknown, or the chat template cannot render one question.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, loss_on: str = "answers") -> None:
        if loss_on not in LOSS_ON:
            raise InputError(f"`loss_on` is {loss_on!r}; it must be one of {', '.join(LOSS_ON)}.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.loss_on = loss_on
        self._lead, self._closing, self._inner_closing = "", "", ""
        if tokenizer.chat_template:
            self._lead = lead(tokenizer)
            self._closing, self._inner_closing = closing(tokenizer), inner_closing(tokenizer)

    def encode(self, example: Example) -> Encoded:
        """Encode a conversation, or a plain text, of which every token carries loss.

        Raises:
            Refused: the template cannot render the conversation.
        """
        if example.messages is None:
            ids = list(self.tokenizer(example.text, verbose=False)["input_ids"])
            return self._cut(self._ended(ids) if example.ends else ids, None)
        ignored = tuple(name for name in sorted(_holds(example)) if name in self.left_out)
        text, spans = self.answers(example.messages, tools=example.tools)
        if not self._closing:  # EOS follows right behind the answer, or the model would never come to it
            text = text[: spans[-1][1]]
        learned, silent = self._parted(example, spans)
        if self.loss_on == "all":
            ids, quiet = self._tokenized(text, silent)
            carries = [not token for token in quiet]
        else:
            ids, carries = self._tokenized(text, learned)
        ended = ids if self._closing else self._ended(ids)
        carries += [spans[-1] in learned] * (len(ended) - len(ids))
        return self._cut(ended, carries, ignored)

    def pieces(self, example: Example) -> list[Example]:
        """A plain text of more than `max_length` tokens as several examples; anything else as it is.

        A piece ends with a line where one ends in its second half, else with a word. All of them together are the text.
        """
        text = example.text
        if text is None or not self.tokenizer.is_fast or len(text.encode()) < self.max_length - SPARE:
            return [example]
        begins = [
            begin
            for begin, _ in self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
                "offset_mapping"
            ]
        ]
        if len(begins) + SPARE <= self.max_length:
            return [example]
        room = max(1, self.max_length - SPARE)
        cuts = [0]
        while len(begins) - (first := bisect_left(begins, cuts[-1])) > room:
            cuts.append(_cut_between(text, cuts[-1], begins[first + room]))
        cuts.append(len(text))
        return [
            replace(example, text=text[begin:end], place=f"{example.place}, part {number}", ends=end == len(text))
            for number, (begin, end) in enumerate(pairwise(cuts), start=1)
        ]

    @cached_property
    def left_out(self) -> frozenset[str]:
        """What the template says nothing of; see `templates.left_out`."""
        return left_out(self.tokenizer) if self.tokenizer.chat_template else frozenset()

    def _silent(self, example: Example) -> frozenset[int]:
        """The numbers of the answers without loss: those the data says, and those of which nothing is rendered."""
        lost: set[str] = {"tool_calls", "reasoning_content"} & self.left_out if _holds(example) else set()
        return example.silent | {
            number
            for number, message in enumerate(example.messages or ())
            if lost & message.keys()
            and not message["content"].strip()
            and not any(name in message for name in ("tool_calls", "reasoning_content") if name not in lost)
        }

    def _parted(self, example: Example, spans: list[Span]) -> tuple[list[Span], list[Span]]:
        """The answers' spans that carry loss, and those that do not."""
        silent = self._silent(example)
        numbers = [number for number, message in enumerate(example.messages or ()) if message["role"] == "assistant"]
        parts: tuple[list[Span], list[Span]] = ([], [])
        for number, span in zip(numbers, spans, strict=True):
            parts[number in silent].append(span)
        return parts

    def answers(self, messages: Turns, *, tools: Sequence[dict[str, Any]] = ()) -> tuple[str, list[Span]]:
        """The rendered conversation, and where in it the answers lie: first character, and one past the last.

        Raises:
            Refused: see `encode`.
        """
        text, messages = render_turns(self.tokenizer, messages, tools=tools)
        found = None
        if not any("tool_calls" in message for message in messages):
            found = _find(text, render_turns(self.tokenizer, _marked(messages), tools=tools)[0], messages)
        found = found or self._by_prefixes(text, messages, tools)
        said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for index, (start, end) in zip(said, found, strict=True):
            if _THOUGHT in messages[index]["content"] or "reasoning_content" in messages[index]:
                asked = self._asked(messages[:index], tools)
                start = len(asked) if len(asked) < start and text.startswith(asked) else start
            elif self._lead and text[:start].endswith(self._lead):
                start -= len(self._lead)
            spans.append((start, self._closed(text, end)))
        return text, spans

    def _closed(self, text: str, end: int) -> int:
        """Behind what ends the turn of an answer that ends there."""
        for begins in (end, end + _white(text, end)):
            for closes in (self._closing, self._inner_closing):
                if closes and text.startswith(closes, begins):
                    return begins + len(closes)
        return end

    def _by_prefixes(self, text: str, messages: Turns, tools: Sequence[dict[str, Any]]) -> list[Span]:
        """Where the template changes what stands around an answer: from behind what it is asked with, to its words."""
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._asked(messages[:index], tools)
            words = message["content"].rpartition(_THOUGHT)[2].strip()
            at = -1
            if text.startswith(asked):
                # Words that the turn's end follows, if there are such: a thought may hold them, too.
                ends = [end for end in (self._closing, self._inner_closing) if end]
                closed = (text.find(words + end, len(asked)) for end in ends if "tool_calls" not in message)
                at = min((place for place in closed if place >= 0), default=text.find(words, len(asked)))
            if at < 0:
                raise Refused("the chat template changes the text of an answer")
            end = at + len(words)
            if "tool_calls" in message and "tool_calls" not in self.left_out:
                end = self._called(text, messages[: index + 1], end, tools)
            spans.append((len(asked), end))
        return spans

    def _called(self, text: str, messages: Turns, begin: int, tools: Sequence[dict[str, Any]]) -> int:
        """Where the last message's calls end, which are rendered behind its words in a form that is the template's."""
        through = render_turns(self.tokenizer, messages, tools=tools)[0].rstrip()
        if text.startswith(through):
            end = len(through)
        else:  # an earlier turn is rendered in another way once others follow it
            ends = (text.find(mark, begin) for mark in (self._closing, self._inner_closing) if mark)
            end = min((place for place in ends if place >= 0), default=begin)
        if end <= begin:
            raise Refused("where a tool call ends cannot be told in the chat template's text")
        return end

    def _asked(self, messages: Turns, tools: Sequence[dict[str, Any]] = ()) -> str:
        """What a model is given, to answer."""
        return render_turns(self.tokenizer, messages, add_generation_prompt=True, tools=tools)[0]

    def _tokenized(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them carry loss."""
        if not self.tokenizer.is_fast:
            return self._tokenized_in_pieces(text, spans)
        ids, carries, straddles = self._overlapping(text, spans, [(0, len(text))])
        if straddles:
            # A header's line feed joined to the answer's first one, say. No generation begins in the middle of a token,
            # so the answer begins with a token of its own, if the vocabulary can begin a text without adding a space.
            cuts = [0, *(start for start, _ in spans), len(text)]
            apart, carries_apart, _ = self._overlapping(text, spans, list(pairwise(cuts)))
            if self._text(apart) == self._text(ids):
                return apart, carries_apart
        return ids, carries

    def _overlapping(self, text: str, spans: list[Span], pieces: list[Span]) -> tuple[list[int], list[bool], bool]:
        """Token ids of each piece, which of them overlap an answer, and whether one overlaps what is before it, too."""
        ids: list[int] = []
        carries: list[bool] = []
        straddles = False
        remaining = list(reversed(spans))
        for first, last in pieces:
            found = self.tokenizer(
                text[first:last], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids += found["input_ids"]
            for begin, end in found["offset_mapping"]:
                begin, end = first + begin, first + max(end, begin + 1)
                while remaining and remaining[-1][1] <= begin:
                    remaining.pop()
                overlaps = bool(remaining) and remaining[-1][0] < end
                carries.append(overlaps)
                straddles = straddles or (overlaps and begin < remaining[-1][0])
        return ids, carries, straddles

    def _tokenized_in_pieces(self, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
        """For tokenizers in Python, which do not say where a token came from."""
        ids: list[int] = []
        carries: list[bool] = []
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for number, (begin, end) in enumerate(pairwise(edges)):
            piece = self.tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
            ids += piece
            carries += [number % 2 == 1] * len(piece)
        return ids, carries

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _cut(self, ids: list[int], carries: list[bool] | None, ignored: tuple[str, ...] = ()) -> Encoded:
        labels = (
            ids if carries is None else [token if told else IGNORED for token, told in zip(ids, carries, strict=True)]
        )
        return Encoded(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length, ignored)


def _cut_between(text: str, begin: int, most: int) -> int:
    """Where to cut a text behind `begin` and not behind `most`: behind a line, or a word, in the second half."""
    middle = (begin + most) // 2
    for mark in ("\n", " "):
        at = text.rfind(mark, middle, most)
        if at >= 0:
            return at + 1
    return max(most, begin + 1)


def _holds(example: Example) -> set[str]:
    """What it has that not every template has a place for."""
    names: set[str] = {
        name for message in example.messages or () for name in ("tool_calls", "reasoning_content") if name in message
    }
    return names | {"tools"} if example.tools else names


def _find(text: str, skeleton: str, messages: Turns) -> list[Span] | None:
    """Where the answers lie in a text of which the skeleton has marks in their place; None if that cannot be told."""
    answers = [message["content"].rpartition(_THOUGHT)[2] for message in messages if message["role"] == "assistant"]
    pieces, rest = [], skeleton
    for number in range(len(answers)):
        before, mark, rest = rest.partition(_mark(number))
        if not mark:
            return None
        pieces.append(before)
    pieces.append(rest)
    if not text.startswith(pieces[0]):
        return None
    spans, position = [], len(pieces[0])
    for number, (answer, behind) in enumerate(zip(answers, pieces[1:], strict=True)):
        is_last = number + 1 == len(answers)
        for end in _ends(text, position, answer):
            if text[end:] == behind if is_last else text.startswith(behind, end):
                break
        else:
            return None
        spans.append((position, end))
        position = end + len(behind)
    return spans


def _ends(text: str, position: int, answer: str) -> Iterator[int]:
    """Where an answer that begins there may end, most of it first: templates trim white space, each its own way."""
    if text.startswith(answer, position):
        yield position + len(answer)
    words = answer.strip()
    begins = position + _white(text, position)
    if not text.startswith(words, begins) or not answer[: _white(answer)].endswith(text[position:begins]):
        return
    ends = begins + len(words)
    behind = answer[len(answer.rstrip()) :]
    for kept in range(len(behind), -1, -1):
        if text.startswith(behind[:kept], ends):
            yield ends + kept


def _white(text: str, position: int = 0) -> int:
    """How many characters of white space stand there."""
    return next((at for at in range(position, len(text)) if not text[at].isspace()), len(text)) - position


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _marked(messages: Turns) -> list[Turn]:
    """The conversation with a mark for each answer, behind its thought if it has one."""
    marked: list[Turn] = []
    number = 0
    for message in messages:
        if message["role"] == "assistant":
            thought, ends, _ = message["content"].rpartition(_THOUGHT)
            message = {**message, "content": thought + ends + _mark(number)}
            number += 1
        marked.append(message)
    return marked
