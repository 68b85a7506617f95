"""Multiple-choice questions with four answers, as MMLU has them: where they come from, and the prompts they become.

Read are MMLU's own folders of CSV files without a header (question, four choices, letter), `dev` for the worked
examples and `test` or `val` for the questions; JSONL with `subject`, `question`, `choices` and `answer`, or with
`subject`, `input` and `output` as the QLoRA authors released them, whose input is a rendered zero-shot prompt; and the
hub's `cais/mmlu`, or what has its fields.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourbit.data.records import load_splits, read_records
from fourbit.errors import InputError

__all__ = ["LETTERS", "Exam", "Question", "read_exam", "render"]

LETTERS = "ABCD"
SPLITS = ("test", "val")
"""Folders that hold questions, the first that is there being taken."""


@dataclass(frozen=True)
class Question:
    """A question, its four choices, and the letter of the right one."""

    subject: str
    text: str
    choices: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class Exam:
    """Questions, and the worked examples that stand before them.

    Attributes:
        questions: subject -> its questions, the subjects in the order of their names.
        examples: subject -> its worked examples; none where the source has none.
        source: what messages call it.
    """

    questions: Mapping[str, Sequence[Question]]
    examples: Mapping[str, Sequence[Question]]
    source: str

    def __len__(self) -> int:
        return sum(map(len, self.questions.values()))


def render(question: Question, examples: Sequence[Question]) -> str:
    """The prompt of the original evaluation, which ends where the letter is to come; no space follows "Answer:"."""
    heading = (
        f"The following are multiple choice questions (with answers) about  {question.subject.replace('_', ' ')}.\n\n"
    )
    worked = "".join(f"{_posed(example)} {example.answer}\n\n" for example in examples)
    return heading + worked + _posed(question)


def _posed(question: Question) -> str:
    lines = [question.text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True))]
    return "\n".join([*lines, "Answer:"])


def read_exam(source: str, *, split: str | None = None, subjects: Sequence[str] = (), limit: int | None = None) -> Exam:
    """Read questions and their worked examples.

    Args:
        source: a folder, a file or a name on the hub; see the head of this module.
        split: of a folder or hub data set; by default test, or val where there is no test.
        subjects: take these only.
        limit: the first so many questions of each subject.

    Raises:
        InputError: it cannot be read; names the file and line. MissingExtra: datasets, for a hub name.
    """
    if limit is not None and limit < 1:
        raise InputError(f"The limit is {limit} questions a subject; it must be 1 or more.")
    path = Path(source).expanduser()
    if path.is_dir():
        questions, examples = _from_folder(path, split)
    elif path.is_file():
        questions, examples = _from_file(path), []
    elif path.suffix or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InputError(f"{source} does not exist; give a folder or file of questions, or a name on the hub.")
    else:
        questions, examples = _from_hub(source, split)
    found = _by_subject(questions)
    unknown = [name for name in subjects if name not in found]
    if unknown:
        raise InputError(f"{source} has no subject {unknown[0]!r}; it has {', '.join(sorted(found))}.")
    taken = {name: found[name][:limit] for name in sorted(found) if not subjects or name in subjects}
    if not taken:
        raise InputError(f"{source} holds no questions.")
    return Exam(taken, _by_subject(examples), source)


def _by_subject(questions: Sequence[Question]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.subject, []).append(question)
    return found


def _from_folder(folder: Path, split: str | None) -> tuple[list[Question], list[Question]]:
    examples = [question for path in sorted(folder.glob("dev/*.csv")) for question in _from_csv(path)]
    for name in SPLITS if split is None else (split,):
        files = sorted(folder.glob(f"{name}/*.csv")) or sorted(folder.glob(f"*_{name}.csv"))
        if files:
            return [question for path in files for question in _from_csv(path)], examples
    lines = sorted(folder.glob("*.jsonl"))
    if len(lines) == 1 and split is None:
        return _from_file(lines[0]), examples
    wanted = " or ".join(f"{name}/*.csv" for name in (SPLITS if split is None else (split,)))
    raise InputError(f"{folder} holds no {wanted}, as MMLU's folders do; give such a folder, or a file of questions.")


def _from_csv(path: Path) -> Iterator[Question]:
    subject = path.stem
    for ending in ("_dev", "_val", "_test"):
        subject = subject.removesuffix(ending)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for row in filter(None, reader):  # not empty lines
                yield _checked(f"{path}, line {reader.line_num}", subject, row[:1], row[1:5], row[5:])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV of questions: {error}.") from error


def _checked(place: str, subject: Any, text: Sequence[Any], choices: Sequence[Any], answer: Sequence[Any]) -> Question:
    letter = str(answer[0]).strip() if answer else ""
    written = len(text) == 1 and isinstance(text[0], str) and text[0].strip() and isinstance(subject, str)
    told = len(choices) == 4 and all(isinstance(one, (str, int, float)) for one in choices)
    if not written or not told or len(answer) != 1 or letter not in tuple(LETTERS):
        raise InputError(f"{place}: a question needs its text, four choices and the letter A, B, C or D of the answer.")
    first, second, third, fourth = map(str, choices)
    return Question(subject, text[0], (first, second, third, fourth), letter)


def _from_file(path: Path) -> list[Question]:
    if path.suffix.lower() == ".csv":
        return list(_from_csv(path))
    records = read_records(path)
    return [_of_record(record, place) for place, record in zip(records.places, records.rows, strict=True)]


def _of_record(record: Mapping[str, Any], place: str) -> Question:
    subject = record.get("subject") or "questions"
    if isinstance(record.get("choices"), (list, tuple)):
        answer = record.get("answer")
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
            answer = LETTERS[answer]
        return _checked(place, subject, [record.get("question", "")], record["choices"], [answer])
    if isinstance(record.get("input"), str):
        return _of_rendered(record["input"], record.get("output"), subject, place)
    raise InputError(
        f"{place}: the record has {', '.join(map(repr, record)) or 'no fields'}; a question has 'question', 'choices'"
        " and 'answer', or 'input' and 'output'."
    )


def _of_rendered(prompt: str, answer: Any, subject: Any, place: str) -> Question:
    """Take a zero-shot prompt apart again, so that worked examples can be put before its question."""
    body = prompt.split("\n\n", 1)[1] if prompt.startswith("The following are multiple choice") else prompt
    choices: list[str] = []
    rest = body.removesuffix("Answer:").removesuffix("\n")
    for letter in reversed(LETTERS):
        rest, found, choice = rest.rpartition(f"\n{letter}. ")
        choices += [choice] if found else []
    return _checked(place, subject, [rest] if rest else [], choices[::-1], [answer])


def _from_hub(name: str, split: str | None) -> tuple[list[Question], list[Question]]:
    splits = load_splits(name, "all")
    wanted = (split, "validation" if split == "val" else split) if split else (*SPLITS, "validation")
    found = next((key for key in wanted if key in splits), None)
    if found is None:
        raise InputError(f"{name} has no split {wanted[0]!r}; it has {', '.join(splits)}.")

    def questions(key: str) -> list[Question]:
        return [_of_record(row, f"{name}, {key}, row {number}") for number, row in enumerate(splits[key], 1)]

    return questions(found), questions("dev") if "dev" in splits else []
