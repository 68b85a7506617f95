"""What the judge is asked, as a text file with places for the question and the two answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fourbit.data.records import read_text
from fourbit.errors import InputError

__all__ = ["MODES", "Template", "load_template"]

MODES = ("verdict", "scores")
"""verdict: the first answer, the second, or a tie; scores: up to ten points for each."""

_SECTION = re.compile(r"^=== (\w+) ===[ \t]*$", flags=re.MULTILINE)
_PLACE = re.compile(r"\{(question|first|second|fence)\}")


@dataclass(frozen=True)
class Template:
    """The words of a judge's prompt.

    Attributes:
        name: the mode it is for and eight digits of its content's hash.
        sections: role ("system" or "user") and text, in their order.
    """

    name: str
    sections: tuple[tuple[str, str], ...]

    def render(self, question: str, first: str, second: str) -> list[dict[str, str]]:
        """The messages to send.

        All places are filled in one pass, so that what looks like a place inside an answer stays as it is. The mark
        that fences the material off depends on all of it: no answer can know it.
        """
        whole = f"{question}\0{first}\0{second}"
        fence = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:10]
        values = {"question": question, "first": first, "second": second, "fence": fence}
        return [{"role": role, "content": _fill(text, values)} for role, text in self.sections]


def _fill(text: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: values[place[1]], text)


def load_template(mode: str, path: Path | None = None) -> Template:
    """Our own prompt for a mode, or a person's in its place.

    Args:
        mode: one of MODES, which says how replies are read.
        path: a text file. Lines `=== system ===` and `=== user ===` begin its parts; without them it is what the user
            says. `{question}`, `{first}` and `{second}` are replaced, and `{fence}` by a mark that no answer holds.

    Raises:
        InputError: no such mode, or the file is not to be used; says why.
    """
    if mode not in MODES:
        raise InputError(f"The mode is {mode!r}; it must be one of {', '.join(MODES)}.")
    if path is None:
        text = (resources.files("fourbit.evaluate.judge") / "prompts" / f"{mode}.txt").read_text(encoding="utf-8")
    elif not path.is_file():
        raise InputError(f"The judge's prompt {path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    else:
        text = read_text(path).replace("\r\n", "\n")
    where = "The judge's prompt" if path is None else str(path)
    missing = [f"{{{name}}}" for name in ("question", "first", "second") if f"{{{name}}}" not in text]
    if missing:
        raise InputError(f"{where} has no place for {' and '.join(missing)}; write it where it is to stand.")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Template(f"{mode}-{digest}", _sections(text, where))


def _sections(text: str, where: str) -> tuple[tuple[str, str], ...]:
    before, *rest = _SECTION.split(text)
    if not rest:
        return (("user", text.strip()),)
    if before.strip():
        raise InputError(f"{where} has text before its first `=== role ===` line; move it below one.")
    found = tuple(zip(rest[::2], (part.strip() for part in rest[1::2]), strict=True))
    roles = [role for role, _ in found]
    if roles not in (["system", "user"], ["user"]):
        raise InputError(
            f"{where} has the parts {', '.join(roles)}; it must have a system part, if any, and a user part."
        )
    return found
