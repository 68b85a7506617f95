"""The file that answers are written to: safe after each batch, taken up again after an interruption.

Answers are appended as they are made and forced to the disk, and put into the order of the prompts at the end. Beside
them, in `NAME.settings.json`, stands how they were made: only a file with the very same settings is taken up.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fourbit import __version__
from fourbit.errors import OutputExists
from fourbit.files import replace_file
from fourbit.generate.answers import Answer
from fourbit.generate.prompts import Asked

__all__ = ["AnswerFile"]


class AnswerFile:
    """Answers to a list of prompts, of which some may be there already.

    Making one reads and checks what is there, and writes nothing.

    Attributes:
        path: of the file.
        done: indices of the prompts that are answered.
        settings: how answers are made.

    Args:
        asked: the prompts.
        settings: how answers are made; what is shown to people where they differ.
        overwrite: start anew, in place of a file that was written by us.

    Raises:
        OutputExists: there is a file that is not ours, or from other settings or prompts, or being written by another
            process.
    """

    def __init__(
        self, path: Path, asked: Sequence[Asked], settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise OutputExists(f"{path} is no ordinary file; choose another output.")
        self.path, self._asked = path, asked
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # as they are when they are read again
        self._notes = path.with_name(f"{path.name}.settings.json")
        self._lines: dict[int, bytes] = {}
        self._size = self._size_found = 0
        self._file: BinaryIO | None = None
        self._size_found = path.stat().st_size if path.exists() else 0
        used = self._size_found > 0
        if used or self._notes.exists():
            found = self._read_notes()
            if used and not overwrite:
                self._compare(found)
                self._read_lines()

    @property
    def done(self) -> frozenset[int]:
        return frozenset(self._lines)

    def __enter__(self) -> AnswerFile:
        """Begin to write.

        Raises:
            OutputExists: another process is writing the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        try:
            _lock(self._file, self.path)
            if os.fstat(self._file.fileno()).st_size != self._size_found:
                raise OutputExists(f"{self.path} was written to by another process meanwhile; start again.")
            notes = {"written_by": f"fourbit {__version__}", "settings": self.settings}
            replace_file(self._notes, (json.dumps(notes, indent=2, ensure_ascii=False) + "\n").encode())
            self._file.truncate(self._size)  # of a line that was cut off by the interruption
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, answers: Mapping[int, Sequence[Answer]]) -> None:
        """Add answers by the index of their prompt, one for each turn; they are on the disk when this returns."""
        if self._file is None:
            raise ValueError("The file is not open; use it in a `with` block.")
        new = {index: self._line(self._asked[index], turns) for index, turns in answers.items()}
        self._file.write(b"".join(new.values()))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._lines.update(new)

    def finish(self) -> None:
        """Put the answers into the order of their prompts; all must be there."""
        ordered = b"".join(self._lines[index] for index in range(len(self._asked)))
        if list(self._lines) != sorted(self._lines):
            replace_file(self.path, ordered)

    @staticmethod
    def _line(asked: Asked, answers: Sequence[Answer]) -> bytes:
        texts = [answer.text for answer in answers]
        record: dict[str, Any] = {
            "id": asked.id,
            "prompt": asked.given,
            "text": texts[0] if not asked.later else _conversation(texts),
            "tokens": sum(answer.tokens for answer in answers),
            "finish_reason": answers[-1].finish_reason,
        }
        if asked.later:
            record["answers"] = texts
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()

    def _read_notes(self) -> dict[str, Any]:
        refusal = OutputExists(f"{self.path} exists and was not written by fourbit; choose another output.")
        if not self._notes.exists():
            raise refusal
        try:
            notes = json.loads(self._notes.read_text(encoding="utf-8"))
            if notes["written_by"].startswith("fourbit ") and isinstance(notes["settings"], dict):
                return dict(notes["settings"])
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise OutputExists(f"{self._notes} exists and was not written by fourbit; choose another output.")

    def _compare(self, found: Mapping[str, Any]) -> None:
        for name, now in self.settings.items():
            if (then := found.get(name)) != now:
                what = (
                    f"by another state of the {name.removesuffix('_files')}: its files differ from those that are there"
                    " now"
                    if name.endswith("_files")
                    else f"with {name} {_shown(then)}, and now it is {_shown(now)}"
                )
                raise OutputExists(f"{self.path} was written {what}; choose another output, or pass --overwrite.")

    def _read_lines(self) -> None:
        """Take over the answers that are there; a last line without an end was cut off, and is dropped."""
        index_of = {str(asked.id): index for index, asked in enumerate(self._asked)}
        content = self.path.read_bytes()
        self._size_found = len(content)
        content = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            where = f"{self.path}, line {number}"
            try:
                record = json.loads(line)
                key, prompt = record["id"], record["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise OutputExists(f"{where} is not an answer as fourbit writes it; choose another output.") from error
            index = index_of.get(str(key))
            if index is None or self._asked[index].given != prompt:
                what = "is not asked for" if index is None else "belongs to another prompt"
                raise OutputExists(
                    f"{where}: the answer with the id {key!r} {what} now; choose another output, or pass --overwrite."
                )
            if index in self._lines:
                raise OutputExists(f"{where}: the id {key!r} is there twice; choose another output.")
            self._lines[index] = line
        self._size = len(content)


def _conversation(answers: Sequence[str]) -> str:
    """The answers to a user's turns as one text, which a judge or a person can compare with another's."""
    return "\n\n".join(f"Answer {number}:\n{text}" for number, text in enumerate(answers, start=1))


def _shown(value: Any) -> str:
    return "the default" if value is None else repr(value) if isinstance(value, str) else str(value)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputExists(f"{path} is being written by another fourbit; wait for it, or choose another.") from error
    except OSError:  # a file system that knows no locks
        return
