"""The records of a file of prompts: what is asked, and under which id."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourbit.data.records import Record, read_records, record_id
from fourbit.errors import InputError
from fourbit.generate.conversation import Message
from fourbit.generate.prompt_sets import find_prompts

__all__ = ["MODES", "Asked", "read_prompts", "read_transcript"]

MODES = ("auto", "chat", "text")
_FIELDS = ("messages", "turns", "prompt", "text")
_QUESTION_IDS = ("question_id", "message_id")
_TURN = re.compile(r"###\s*(Human|Assistant):")


@dataclass(frozen=True)
class Asked:
    """One record.

    Attributes:
        id: its `id`, `question_id` or `message_id`, or else its number in the file, from 1.
        given: the prompt as it stands in the record: a text, or the messages of a conversation.
        asked: what the model is to be asked: a text to continue, or messages to answer.
        where: the file and line, for complaints.
        later: what the user goes on to say, turn by turn, after each answer.
    """

    id: str | int
    given: str | Sequence[Message]
    asked: str | Sequence[Message]
    where: str
    later: tuple[str, ...] = ()


def read_prompts(source: str | os.PathLike[str], *, mode: str = "auto", system: str | None = None) -> list[Asked]:
    """Read prompts: a file of JSON lines, a JSON list, CSV or parquet, a dataset of the hub, or one of `PROMPT_SETS`.

    A record's `messages` are a conversation, whose last message is answered. Its `turns` are what a user says one after
    the other, each answered in its turn. Its `prompt` is what a user says, or a list of messages. Its `text` is a
    text to continue; beside a `question_id` or `message_id`, as in the Vicuna and OpenAssistant questions, it is what a
    user says. A transcript that ends in `### Assistant:` is taken apart into its turns.

    Args:
        mode: "auto", as above; "chat": a `text` is what a user says, always; "text": a `prompt` too is a text to
            continue.
        system: what the system says at the beginning of each conversation that does not begin so.

    Raises:
        InputError: there is no such source, a record in it is broken, or an id is there twice; names the line.
    """
    if mode not in MODES:
        raise InputError(f"The mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    found: dict[str, Asked] = {}
    records = read_records(find_prompts(source))
    for number, (where, record) in enumerate(zip(records.places, records.rows, strict=True), start=1):
        asked = _asked(record, number, where, mode, system)
        if (other := found.setdefault(str(asked.id), asked)) is not asked:
            raise InputError(f"{where}: the id {asked.id!r} is that of {other.where} already; ids must differ.")
    return list(found.values())


def read_transcript(text: str) -> list[dict[str, str]] | None:
    """The turns of a transcript in Guanaco's form that waits for its assistant; None where a text is no such thing.

    What stands before the first turn is what the system says.
    """
    parts = _TURN.split(text)
    speakers, contents = parts[1::2], [part.strip() for part in parts[2::2]]
    if "Human" not in speakers or speakers[-1] != "Assistant" or contents[-1]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[name], "content": said} for name, said in zip(speakers, contents, strict=True)][:-1]
    return [{"role": "system", "content": parts[0].strip()}, *turns] if parts[0].strip() else turns


def _asked(record: Record, number: int, where: str, mode: str, system: str | None) -> Asked:
    field = next((name for name in _FIELDS if record.get(name) is not None), None)
    if field is None:
        fields = ", ".join(map(repr, record)) or "nothing"
        raise InputError(f"{where}: the record holds no prompt, text, messages or turns; it has {fields}.")
    given, later = record[field], tuple[str, ...]()
    if field == "turns":
        given, later = _users_turns(given, where)
    if isinstance(given, str) and field != "messages":
        asked = _text(given, where, field)
        question = any(record.get(name) is not None for name in _QUESTION_IDS)
        continued = mode == "text" or (mode == "auto" and field == "text" and not question)
        turns = asked if continued else (read_transcript(asked) or [{"role": "user", "content": asked}])
    elif isinstance(given, list) and field != "text":
        if mode == "text":
            raise InputError(f"{where}: it holds a conversation, which is no text to continue; leave the mode out.")
        turns = given[:1] if later else _messages(given, where, field)
    else:
        kind = {"messages": "a list of messages", "text": "text"}.get(field, "text or a list of messages")
        raise InputError(f"{where}: the field {field!r} must be {kind}.")
    if system is not None and not isinstance(turns, str) and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    return Asked(record_id(record, number, where), given, turns, where, later)


def _users_turns(turns: Any, where: str) -> tuple[str | list[dict[str, str]], tuple[str, ...]]:
    """What is given as a prompt, and what comes after its first answer."""
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: the field 'turns' must be a list of what a user says.")
    said = [_text(turn, where, "turns") for turn in turns]
    given = said[0] if len(said) == 1 else [{"role": "user", "content": content} for content in said]
    return given, tuple(said[1:])


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {field!r} must be text.")
    if not value.strip():
        raise InputError(f"{where}: the field {field!r} is empty.")
    return value


def _messages(messages: list[Any], where: str, field: str) -> list[dict[str, str]]:
    if not messages:
        raise InputError(f"{where}: the field {field!r} is an empty conversation.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: message {number} must have a role and a content.")
    return [{key: _text(message[key], where, key) for key in ("role", "content")} for message in messages]
