"""What records are, by their fields, and the conversations they hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fourbit.data.records import Record, Records
from fourbit.errors import InputError

__all__ = ["KINDS", "Example", "Recognised", "recognise"]


@dataclass(frozen=True)
class Example:
    """One thing to learn.

    Attributes:
        messages: the turns of a conversation, each with `role` (system, user, assistant) and `content`; the last is the
            assistant's. None for plain text.
        text: plain text, to be continued as it is. None for a conversation.
        place: where it was read, for messages to the user.
    """

    messages: tuple[dict[str, str], ...] | None
    text: str | None
    place: str


@dataclass(frozen=True)
class Recognised:
    """What records were found to be.

    Attributes:
        kind: a key of `KINDS`.
        sentence: what was recognised, by which fields, in how many records.
        examples: what can be learned from; a record can hold several.
        records: how many there were.
        empty: how many of them had no answer, or an empty one, and were dropped.
    """

    kind: str
    sentence: str
    examples: list[Example]
    records: int
    empty: int


class _Malformed(Exception):
    """A record has the fields of its kind, but not what belongs into them; the text says what."""


@dataclass(frozen=True)
class _Kind:
    """A kind of record: its name, the fields it is known by, and how to take it apart.

    Attributes:
        name: as the user is told.
        known_by: field names; a record is of this kind if it has all fields of one of the tuples.
        conversations: yields the conversations of a record, or a plain text; raises _Malformed.
    """

    name: str
    known_by: tuple[tuple[str, ...], ...]
    conversations: Callable[[Record, tuple[str, ...]], Iterator[list[dict[str, str]] | str]]

    def fields_of(self, record: Record) -> tuple[str, ...] | None:
        """The fields by which a record is of this kind, or None."""
        for fields in self.known_by:
            if all(record.get(field) is not None for field in fields):
                return fields
        return None


def recognise(records: Records) -> Recognised:
    """Find out what records are, and take them apart.

    Raises:
        InputError: their fields are of no known kind; or a record is not like the others, or malformed, which names it.
    """
    found = [_kind_of(record) for record in records.rows]
    counts = Counter(kind for kind in found if kind)
    if not counts:
        raise InputError(
            f"{records.source}: no known kind of record has the fields {_fields(records.rows)}. Known are {_known()}."
        )
    kind = counts.most_common(1)[0][0]
    settled = KINDS[kind]
    examples: list[Example] = []
    empty = 0
    used: Counter[tuple[str, ...]] = Counter()
    for record, place in zip(records.rows, records.places, strict=True):
        fields = settled.fields_of(record)
        if fields is None:
            if _is_answerless(record, settled):
                empty += 1
                continue
            raise InputError(
                f"{place}: this record has the fields {_fields([record])}, but the others are {settled.name} with"
                f" {_either(settled.known_by)}."
            )
        used[fields] += 1
        try:
            taken = [example for each in settled.conversations(record, fields) if (example := _example(each, place))]
        except _Malformed as reason:
            raise InputError(f"{place}: {reason}.") from None
        examples += taken
        empty += not taken
    names = _listed(used.most_common(1)[0][0])
    sentence = f"Recognised {settled.name} by {names}: {len(records.rows):,} records, {len(examples):,} examples."
    if empty:
        sentence += f" Left out, without an answer: {empty:,}."
    return Recognised(kind, sentence, examples, len(records.rows), empty)


def _kind_of(record: Record) -> str | None:
    return next((name for name, kind in KINDS.items() if kind.fields_of(record)), None)


def _is_answerless(record: Record, kind: _Kind) -> bool:
    """Whether the fields are there, but null."""
    return any(all(field in record for field in fields) for fields in kind.known_by)


def _example(conversation: list[dict[str, str]] | str, place: str) -> Example | None:
    """None where there is nothing to learn."""
    if isinstance(conversation, str):
        return Example(None, conversation, place) if conversation.strip() else None
    messages = list(conversation)
    while messages and (messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip()):
        messages.pop()  # nothing is learned from what comes after the last answer
    return Example(tuple(messages), None, place) if messages else None


# ---- the kinds


ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
}  # fmt: skip
"""What others call a role, and what it is called here."""

TRANSCRIPTS = (
    re.compile(r"(?:^|\s*)###\s*(Human|Assistant):[ \t]*"),  # Guanaco's, OASST1
    re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*"),  # HH-RLHF
    re.compile(r"(?:^|\n)<(human|bot)>:[ \t]*"),  # OIG's Chip2
)
"""How conversations are marked in plain text."""

END_MARKS = ("<|endoftext|>", "</s>")
"""What some files write at the end of an answer; the tokenizer's own end comes with the template."""


def _transcript(text: str) -> list[dict[str, str]] | None:
    """The turns of a conversation in plain text, or None where it is none."""
    for pattern in TRANSCRIPTS:
        marks = list(pattern.finditer(text))
        if not marks or text[: marks[0].start()].strip():
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(text)]
        turns: list[dict[str, str]] = []
        for mark, end in zip(marks, ends, strict=True):
            role, content = ROLES[mark.group(1).lower()], text[mark.end() : end].strip()
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += "\n\n" + content
            else:
                turns.append({"role": role, "content": content})
        if any(turn["role"] == "assistant" for turn in turns) and turns[0]["role"] == "user":
            return turns
    return None


def _turns(value: Any) -> list[dict[str, str]]:
    """Messages with role and content, or ShareGPT's from and value."""
    if not isinstance(value, list):
        raise _Malformed(f"the conversation must be a list of messages, not {type(value).__name__}")
    turns: list[dict[str, str]] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _Malformed(f"message {number} must have a role and a content")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            raise _Malformed(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
        turns.append({"role": ROLES[role], "content": _text(content, f"the content of message {number}")})
    return turns


def _text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)  # the parts of a multimodal message
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise _Malformed(f"{what} must be text, not {type(value).__name__}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _Malformed(f"{what} holds half of a surrogate pair, which is not text")
    return value


def _answer(value: Any, what: str) -> str:
    text = _text(value, what)
    for mark in END_MARKS:
        text = text.removesuffix(mark)
    return text


def _asked(question: str, answer: str, system: str = "") -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _conversation(record: Record, fields: tuple[str, ...]) -> Iterator[list[dict[str, str]] | str]:
    turns = _turns(record[fields[0]])
    system = _text(record.get("system"), "`system`")
    if system and not any(turn["role"] == "system" for turn in turns):
        turns = [{"role": "system", "content": system}, *turns]
    yield turns


def _preference(record: Record, fields: tuple[str, ...]) -> Iterator[list[dict[str, str]] | str]:
    chosen, prompt = record["chosen"], record.get("prompt")
    before = _turns(prompt) if isinstance(prompt, list) else []
    if isinstance(chosen, list):
        turns = _turns(chosen)
        if isinstance(prompt, str) and prompt and turns and turns[0]["role"] == "assistant":
            before = [{"role": "user", "content": prompt}]
        yield turns if turns[: len(before)] == before else before + turns
        return
    answer = _answer(chosen, "`chosen`")
    if transcript := _transcript(answer):
        yield transcript
    elif isinstance(prompt, str) and prompt:
        yield _asked(prompt, answer)
    elif before:
        yield [*before, {"role": "assistant", "content": answer}]
    else:
        raise _Malformed("`chosen` is no transcript (Human: ... Assistant: ...), and there is no `prompt`")


def _alpaca(record: Record, fields: tuple[str, ...]) -> Iterator[list[dict[str, str]] | str]:
    answer = _answer(record[fields[1]], f"`{fields[1]}`")
    instruction = _text(record["instruction"], "`instruction`")
    given = _text(record.get("input", record.get("context")), "`input`")
    yield _asked(_with_input(instruction, given), answer, _text(record.get("system"), "`system`"))


def _with_input(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _self_instruct(record: Record, fields: tuple[str, ...]) -> Iterator[list[dict[str, str]] | str]:
    if not isinstance(record["instances"], list):
        raise _Malformed("`instances` must be a list")
    instruction = _text(record["instruction"], "`instruction`")
    for instance in record["instances"]:
        if not isinstance(instance, dict) or "output" not in instance:
            raise _Malformed("every instance needs an `output`")
        constraints = _text(instance.get("constraints"), "`constraints`")
        question = _with_input(instruction, _text(instance.get("input"), "`input`"))
        if constraints.strip() and constraints.strip().lower() not in ("none", "none."):
            question += f"\n\nConstraints: {constraints}"
        yield _asked(question, _answer(instance["output"], "`output`"))


def _prompt_completion(record: Record, fields: tuple[str, ...]) -> Iterator[list[dict[str, str]] | str]:
    prompt, completion = record[fields[0]], record[fields[1]]
    if isinstance(prompt, list) and isinstance(completion, list):
        yield _turns(prompt) + _turns(completion)
        return
    question, answer = _text(prompt, f"`{fields[0]}`"), _answer(completion, f"`{fields[1]}`")
    asked = _transcript(question)
    if asked and asked[-1] == {"role": "assistant", "content": ""}:  # "### Human: ... ### Assistant:"
        yield [*asked[:-1], {"role": "assistant", "content": answer}]
        return
    yield _asked(question, answer, _text(record.get("system", record.get("system_prompt")), "`system`"))


def _plain(record: Record, fields: tuple[str, ...]) -> Iterator[list[dict[str, str]] | str]:
    text = _text(record["text"], "`text`")
    yield _transcript(text) or text


KINDS = {
    "conversation": _Kind("conversations", (("messages",), ("conversations",), ("conversation",)), _conversation),
    "preference": _Kind("preference pairs (their chosen side)", (("chosen",),), _preference),
    "self-instruct": _Kind("Self-Instruct records", (("instruction", "instances"),), _self_instruct),
    "alpaca": _Kind("Alpaca records", (("instruction", "output"), ("instruction", "response")), _alpaca),
    "prompt-completion": _Kind(
        "prompts with completions",
        (
            ("prompt", "completion"),
            ("prompt", "response"),
            ("prompt", "answer"),
            ("question", "answer"),
            ("question", "response"),
            ("inputs", "targets"),
            ("input", "output"),
        ),
        _prompt_completion,
    ),
    "text": _Kind("texts", (("text",),), _plain),
}
"""In the order in which they are looked for: Alpaca's records carry a `text`, too."""


def _fields(rows: list[Record]) -> str:
    names = list(dict.fromkeys(str(name) for record in rows for name in record))
    return ", ".join(names[:12]) or "(none)"


def _known() -> str:
    return "; ".join(f"{kind.name}: {_either(kind.known_by[:2])}" for kind in KINDS.values())


def _either(known_by: tuple[tuple[str, ...], ...]) -> str:
    return " or ".join(_listed(fields) for fields in known_by)


def _listed(fields: tuple[str, ...]) -> str:
    return " and ".join(f"`{field}`" for field in fields)
