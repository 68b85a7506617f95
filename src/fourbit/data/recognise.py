"""What records are, by their fields, and the conversations they hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fourbit.data.messages import (
    SILENT,
    Malformed,
    Message,
    as_answer,
    as_text,
    as_tools,
    as_transcript,
    as_turns,
    brief,
)
from fourbit.data.records import Record, Records
from fourbit.errors import InputError

__all__ = ["KINDS", "Example", "Recognised", "recognise"]


NO_ANSWER = "without an answer"
BAD_ANSWER = "as their `label` says that the answer is a bad one"
ALL_SILENT = "as they ask for no loss on any of their answers"
"""Why a record is left out."""

EMPTY_TURN = "as they are empty"
MARKED_TURN = "as the data says so (`weight`, `train`)"
"""Why an answer carries no loss."""

UNANSWERED = "unanswered"
"""A conversation goes on behind its last answer; that part is not read."""


@dataclass(frozen=True)
class Example:
    """One thing to learn.

    Attributes:
        messages: the turns of a conversation, see `messages.Message`; the last is the assistant's. None for plain text.
        text: plain text, to be continued as it is. None for a conversation.
        place: where it was read, for messages to the user.
        silent: the numbers of those answers among the messages, from 0, that carry no loss.
        tools: the functions that the assistant may call, for templates that have a place for them.
        ends: whether the text ends there, or is a piece of a longer one.
    """

    messages: tuple[Message, ...] | None
    text: str | None
    place: str
    silent: frozenset[int] = frozenset()
    tools: tuple[dict[str, Any], ...] = ()
    ends: bool = True


@dataclass(frozen=True)
class Recognised:
    """What records were found to be.

    Attributes:
        kind: a key of `KINDS`.
        sentence: what was recognised, by which fields, in how many records, and what was left out.
        examples: what can be learned from; a record can hold several.
        records: how many there were.
        left_out: why records were dropped, one of the reasons above -> their places.
        noted: what is particular to records that were not, EMPTY_TURN, MARKED_TURN or UNANSWERED -> the place of each
            such answer or conversation.
    """

    kind: str
    sentence: str
    examples: list[Example]
    records: int
    left_out: Mapping[str, list[str]]
    noted: Mapping[str, list[str]]

    @property
    def empty(self) -> int:
        """How many records were dropped."""
        return sum(map(len, self.left_out.values()))


@dataclass(frozen=True)
class _Kind:
    """A kind of record: its name, the fields it is known by, and how to take it apart.

    Attributes:
        name: as the user is told.
        known_by: field names; a record is of this kind if it has all fields of one of the tuples.
        conversations: yields the conversations of a record, or a plain text; raises Malformed.
    """

    name: str
    known_by: tuple[tuple[str, ...], ...]
    conversations: Callable[[Record, tuple[str, ...]], Iterator[list[Message] | str]]

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
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    noted: defaultdict[str, list[str]] = defaultdict(list)
    used: Counter[tuple[str, ...]] = Counter()
    for record, place in zip(records.rows, records.places, strict=True):
        fields = settled.fields_of(record)
        if fields is None:
            if _is_answerless(record, settled):
                left_out[NO_ANSWER].append(place)
                continue
            raise InputError(
                f"{place}: this record has the fields {_fields([record])}, but the others are {settled.name} with"
                f" {_either(settled.known_by)}."
            )
        used[fields] += 1
        if kind == "prompt-completion" and _is_bad(record):
            left_out[BAD_ANSWER].append(place)
            continue
        try:
            tools = as_tools(record.get("tools")) if isinstance(record[fields[0]], list) else []
            each = [_example(one, place, tools, noted) for one in settled.conversations(record, fields)]
        except Malformed as problem:
            raise InputError(f"{place}: {problem}.") from None
        taken = [one for one in each if isinstance(one, Example)]
        examples += taken
        if not taken:
            left_out[next((str(one) for one in each if one != NO_ANSWER), NO_ANSWER)].append(place)
    by = used.most_common(1)[0][0] if used else settled.known_by[0]
    sentence = _sentence(records, settled, by, len(examples))
    sentence += "".join(f" Left out, {reason}: {len(places):,}." for reason, places in left_out.items())
    for reason, places in noted.items():
        if reason != UNANSWERED:
            sentence += f" Without loss, {reason}: {len(places):,} answers."
    return Recognised(kind, sentence, examples, len(records.rows), dict(left_out), dict(noted))


def _sentence(records: Records, kind: _Kind, fields: tuple[str, ...], examples: int) -> str:
    if records.is_plain_text:
        return f"Recognised plain text: {examples:,} documents, all of whose tokens are learned."
    count = f"{len(records.rows):,} records, {examples:,} examples"
    return f"Recognised {kind.name} by {_listed(fields)}: {count}."


def _kind_of(record: Record) -> str | None:
    return next((name for name, kind in KINDS.items() if kind.fields_of(record)), None)


def _is_answerless(record: Record, kind: _Kind) -> bool:
    """Whether the fields are there, but null."""
    return any(all(field in record for field in fields) for fields in kind.known_by)


def _is_bad(record: Record) -> bool:
    """Whether an answer is one that nobody wanted, as in the records of KTO."""
    label = record.get("label")
    return label is False or (isinstance(label, str) and label.strip().lower() == "false")


def _example(
    conversation: list[Message] | str, place: str, tools: list[dict[str, Any]], noted: defaultdict[str, list[str]]
) -> Example | str:
    """What can be learned of it, or why nothing can."""
    if isinstance(conversation, str):
        return Example(None, conversation, place) if conversation.strip() else NO_ANSWER
    answers = [number for number, message in enumerate(conversation) if message["role"] == "assistant"]
    empty = {number for number in answers if not _says_something(conversation[number])}
    marked = {number for number in answers if conversation[number].get(SILENT)} - empty
    last = max({*answers} - empty - marked, default=None)
    if last is None:
        return ALL_SILENT if marked else NO_ANSWER
    silent = frozenset(number for number in empty | marked if number < last)
    for reason, numbers in ((EMPTY_TURN, silent & empty), (MARKED_TURN, marked)):
        if numbers:
            noted[reason] += [place] * len(numbers)
    if any(message["role"] != "assistant" for message in conversation[last + 1 :]):
        noted[UNANSWERED].append(place)
    # Nothing is learned from what comes after the last answer.
    messages = tuple({key: message[key] for key in message if key != SILENT} for message in conversation[: last + 1])
    return Example(messages, None, place, silent, tuple(tools))


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


# ---- the kinds


def _asked(question: str, answer: str, system: str = "") -> list[Message]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _conversation(record: Record, fields: tuple[str, ...]) -> Iterator[list[Message] | str]:
    turns = as_turns(record[fields[0]])
    system = as_text(record.get("system"), "`system`")
    if system and not any(turn["role"] == "system" for turn in turns):
        turns = [{"role": "system", "content": system}, *turns]
    yield turns


def _preference(record: Record, fields: tuple[str, ...]) -> Iterator[list[Message] | str]:
    chosen, prompt = record["chosen"], record.get("prompt")
    before = as_turns(prompt) if isinstance(prompt, list) else []
    if isinstance(chosen, list):
        turns = as_turns(chosen)
        if isinstance(prompt, str) and prompt and turns and turns[0]["role"] == "assistant":
            before = [{"role": "user", "content": prompt}]
        yield turns if turns[: len(before)] == before else before + turns
        return
    answer = as_answer(chosen, "`chosen`")
    if transcript := as_transcript(answer):
        yield transcript
    elif isinstance(prompt, str) and prompt:
        yield _asked(prompt, answer)
    elif before:
        yield [*before, {"role": "assistant", "content": answer}]
    else:
        raise Malformed("`chosen` is no transcript (Human: ... Assistant: ...), and there is no `prompt`")


def _alpaca(record: Record, fields: tuple[str, ...]) -> Iterator[list[Message] | str]:
    answer = as_answer(record[fields[1]], f"`{fields[1]}`")
    instruction = as_text(record["instruction"], "`instruction`")
    given = as_text(record.get("input", record.get("context")), "`input`")
    yield _asked(_with_input(instruction, given), answer, as_text(record.get("system"), "`system`"))


def _with_input(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _self_instruct(record: Record, fields: tuple[str, ...]) -> Iterator[list[Message] | str]:
    if not isinstance(record["instances"], list):
        raise Malformed("`instances` must be a list")
    instruction = as_text(record["instruction"], "`instruction`")
    for instance in record["instances"]:
        if not isinstance(instance, dict) or "output" not in instance:
            raise Malformed("every instance needs an `output`")
        constraints = as_text(instance.get("constraints"), "`constraints`")
        question = _with_input(instruction, as_text(instance.get("input"), "`input`"))
        if constraints.strip() and constraints.strip().lower() not in ("none", "none."):
            question += f"\n\nConstraints: {constraints}"
        yield _asked(question, as_answer(instance["output"], "`output`"))


def _prompt_completion(record: Record, fields: tuple[str, ...]) -> Iterator[list[Message] | str]:
    prompt, completion = record[fields[0]], record[fields[1]]
    if isinstance(prompt, list) and isinstance(completion, list):
        yield as_turns(prompt) + as_turns(completion)
        return
    question, answer = as_text(prompt, f"`{fields[0]}`"), as_answer(completion, f"`{fields[1]}`")
    asked = as_transcript(question)
    if asked and asked[-1] == {"role": "assistant", "content": ""}:  # "### Human: ... ### Assistant:"
        yield [*asked[:-1], {"role": "assistant", "content": answer}]
        return
    yield _asked(question, answer, as_text(record.get("system", record.get("system_prompt")), "`system`"))


def _plain(record: Record, fields: tuple[str, ...]) -> Iterator[list[Message] | str]:
    text = as_text(record["text"], "`text`")
    yield as_transcript(text) or text


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
    names = list(dict.fromkeys(brief(str(name))[1:-1] for record in rows for name in record))
    return ", ".join(names[:12]) or "(none)"


def _known() -> str:
    return "; ".join(f"{kind.name}: {_either(kind.known_by[:2])}" for kind in KINDS.values())


def _either(known_by: tuple[tuple[str, ...], ...]) -> str:
    return " or ".join(_listed(fields) for fields in known_by)


def _listed(fields: tuple[str, ...]) -> str:
    return " and ".join(f"`{field}`" for field in fields)
