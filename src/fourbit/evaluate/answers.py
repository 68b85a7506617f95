"""The answers that a judge or people compare: one file for each system, as `fourbit generate` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.data.records import Record, read_records, record_id
from fourbit.errors import InputError

if TYPE_CHECKING:
    from fourbit.generate.prompts import Asked

__all__ = ["Answered", "System", "pair_systems", "read_questions", "read_systems", "same_prompts", "unanswered"]

_SHOWN = 5
"""How many ids a message names."""


@dataclass(frozen=True)
class Answered:
    """One answer: the id of its prompt, the question (None where the file does not hold it), the text, the place."""

    id: str | int
    question: str | None
    text: str
    where: str


@dataclass(frozen=True)
class System:
    """A system and its answers, by the id of the prompt as text."""

    name: str
    source: str
    answers: Mapping[str, Answered]


def read_systems(sources: Sequence[str | tuple[str, Path]]) -> list[System]:
    """Read files of answers: {id, prompt, text}, or {question_id, text, generation} as the QLoRA authors released them.

    Args:
        sources: FILE, NAME=FILE or (name, file); without a name a system is called as its file.

    Raises:
        InputError: a file or record is broken, an id is there twice, or two systems have one name.
    """
    systems: list[System] = []
    for source in sources:
        name, path = _named(source) if isinstance(source, str) else source
        if any(other.name == name for other in systems):
            raise InputError(f"Two systems are called {name!r}; name one of them, as in other={path}.")
        systems.append(System(name, str(path), _by_id(path)))
    return systems


def _named(source: str) -> tuple[str, Path]:
    name, equals, rest = source.partition("=")
    if equals and not Path(source).exists():
        if not name or not rest:
            raise InputError(f"{source} is not NAME=FILE; write what the system is called before the equals sign.")
        return name, Path(rest)
    return Path(source).stem, Path(source)


def _by_id(path: Path) -> dict[str, Answered]:
    if not path.is_file():
        raise InputError(f"{path} {'is a folder, not a file of answers' if path.is_dir() else 'does not exist'}.")
    records = read_records(path)
    found: dict[str, Answered] = {}
    for number, (where, record) in enumerate(zip(records.places, records.rows, strict=True), start=1):
        answered = _answered(record, number, where)
        if (other := found.setdefault(str(answered.id), answered)) is not answered:
            raise InputError(f"{where}: the id {answered.id!r} is that of {other.where} already; ids must differ.")
    return found


def _answered(record: Record, number: int, where: str) -> Answered:
    released = record.get("generation") is not None
    field = "generation" if released else "text"
    text = record.get(field)
    if not isinstance(text, str):
        fields = ", ".join(map(repr, record)) or "nothing"
        raise InputError(f"{where}: an answer must have its text in 'text'; the record has {fields}.")
    asked = record.get("text") if released else record.get("prompt")
    question = None if asked is None else _question(asked, where, "text" if released else "prompt")
    return Answered(record_id(record, number, where), question, text, where)


def unanswered(source: str, asked: Sequence[Asked]) -> System:
    """Prompts as a system that answers nothing, to hold others' answers against."""
    answers = {str(one.id): Answered(one.id, _question(one.given, one.where, "prompt"), "", one.where) for one in asked}
    return System("", source, answers)


def read_questions(source: str | Path) -> dict[str, str]:
    """The questions by their ids, for answers that do not hold them.

    Args:
        source: a file, or whatever else `fourbit.generate.prompts.read_prompts` takes.

    Raises:
        InputError: there is no such source, or a record in it is broken.
    """
    from fourbit.generate.prompts import read_prompts  # which brings torch along

    return {str(one.id): _question(one.given, one.where, "prompt") for one in read_prompts(source)}


def _question(asked: Any, where: str, field: str) -> str:
    """A question as the judge reads it; of a conversation all turns, each under who says it."""
    if isinstance(asked, str):
        turns = _transcript(asked)
        return asked.strip() if turns is None else _turns(turns, where, field)
    if isinstance(asked, list) and asked:
        return _turns(asked, where, field)
    raise InputError(f"{where}: the field {field!r} must be text or a list of messages.")


def _transcript(text: str) -> list[dict[str, str]] | None:
    if "### Assistant:" not in text:
        return None
    from fourbit.generate.prompts import read_transcript  # which brings torch along

    return read_transcript(text)


def _turns(messages: Sequence[Any], where: str, field: str) -> str:
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise InputError(f"{where}: each message of {field!r} must have a role and a content.")
    said = [(message["role"], message["content"].strip()) for message in messages if message["role"] != "system"]
    if len(said) == 1:
        return str(said[0][1])
    return "\n\n".join(f"{role}:\n{content}" for role, content in said)


def same_prompts(
    systems: Sequence[System], questions: Mapping[str, str] | None = None, *, common: bool = False
) -> dict[str, tuple[str | int, str]]:
    """The prompts that all systems answer: id as text to id and question, in the order of the first file.

    Args:
        questions: takes the place of what stands in the files of answers.
        common: leave out prompts that some system does not answer.

    Raises:
        InputError: a system does not answer what others do (names the ids), two answer different questions under one
        id, a question is nowhere to be found, or nothing is common to all.
    """
    first = systems[0]
    every = list(dict.fromkeys(key for system in systems for key in system.answers))
    if not common:
        for system in systems:
            _refuse_missing(system, [key for key in every if key not in system.answers], systems)
    kept = [key for key in first.answers if all(key in system.answers for system in systems)]
    if not kept:
        raise InputError("There is no prompt that all systems answer; are these answers to the same prompts?")
    return {key: (first.answers[key].id, _agreed(key, systems, questions)) for key in kept}


def _refuse_missing(system: System, missing: Sequence[str], systems: Sequence[System]) -> None:
    if not missing:
        return
    other = next(each for each in systems if missing[0] in each.answers)
    named = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    raise InputError(
        f"{system.source} has no answer to {'prompt' if len(missing) == 1 else 'prompts'} {named}, which"
        f" {'is' if len(missing) == 1 else 'are'} in {other.source}; generate what is missing, or pass --common to take"
        " only what all answer."
    )


def _agreed(key: str, systems: Sequence[System], questions: Mapping[str, str] | None) -> str:
    if questions is not None:
        if key not in questions:
            raise InputError(f"The file of questions has none with the id {key}, which {systems[0].source} answers.")
        return questions[key]
    known = [answered for system in systems if (answered := system.answers[key]).question is not None]
    if not known:
        raise InputError(
            f"{systems[0].answers[key].where}: the question is not in the record (no 'prompt'); pass --questions FILE."
        )
    for other in known[1:]:
        if other.question != known[0].question:
            raise InputError(
                f"{other.where}: the prompt with the id {key} is not that of {known[0].where}; the files must answer"
                " the same prompts."
            )
    return str(known[0].question)


def pair_systems(systems: Sequence[System], reference: str | None) -> list[tuple[System, System]]:
    """All pairs, or each system with the reference, which then stands second.

    Args:
        reference: the name of one of the systems, or its file.

    Raises:
        InputError: fewer than two systems, or the reference is none of them.
    """
    if len(systems) < 2:
        raise InputError("Answers are compared; give those of two systems or more.")
    if reference is None:
        return list(combinations(systems, 2))
    found = [system for system in systems if reference in (system.name, system.source)]
    if not found:
        names = ", ".join(system.name for system in systems)
        raise InputError(f"The reference {reference!r} is none of the systems given; they are {names}.")
    return [(system, found[0]) for system in systems if system is not found[0]]
