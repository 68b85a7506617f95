"""Sets of prompts that are known by name. They are downloaded when they are first asked for, and kept."""

from __future__ import annotations

import difflib
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from fourbit.errors import InputError
from fourbit.files import replace_file

__all__ = ["PROMPT_SETS", "PromptSet", "find_prompts"]

_TIMEOUT_S = 30


@dataclass(frozen=True)
class PromptSet:
    """Where a set lies.

    Attributes:
        address: of one file of JSON lines, in a state that does not change.
        count: how many prompts it holds.
        what: for people.
    """

    address: str
    count: int
    what: str


PROMPT_SETS = {
    "vicuna": PromptSet(
        "https://raw.githubusercontent.com/lm-sys/FastChat/589532dcfa83700f950b9aa3983416c543afabc0"
        "/fastchat/llm_judge/data/vicuna_bench/question.jsonl",
        80,
        "the questions of the Vicuna benchmark",
    ),
    "openassistant": PromptSet(
        "https://raw.githubusercontent.com/artidoro/qlora/05daee4ead5387636f6caf06a7941db789e75900"
        "/eval/prompts/oa_questions.jsonl",
        953,
        "the OpenAssistant benchmark of the QLoRA authors, one to three turns in many languages",
    ),
}


def find_prompts(source: str | os.PathLike[str]) -> str:
    """What to read: a file, or a name on the hub, as it is; of a set in `PROMPT_SETS` its file in the cache.

    Raises:
        InputError: it is none of these, or the set is not in the cache and cannot be had.
    """
    name, path = os.fspath(source), Path(source)
    if not name:
        raise InputError(f"There is no source of prompts; {_sources()}")
    if path.is_file() or (name not in PROMPT_SETS and name.count("/") == 1 and not path.exists() and not path.suffix):
        return name
    if path.is_dir():
        raise InputError(f"{name} is a folder, not a file of prompts.")
    if name in PROMPT_SETS:
        return str(_fetched(name, PROMPT_SETS[name]))
    close = difflib.get_close_matches(name.lower(), PROMPT_SETS, n=1)
    raise InputError(f"{name} does not exist; {f'did you mean {close[0]}?' if close else _sources()}")


def _sources() -> str:
    return f"give a file, a dataset of the hub as owner/name, or {', '.join(PROMPT_SETS)}."


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fourbit" / "prompts"


def _fetched(name: str, found: PromptSet) -> Path:
    path = _cache() / f"{name}.jsonl"
    if path.exists():
        return path
    try:
        with urllib.request.urlopen(found.address, timeout=_TIMEOUT_S) as reply:
            content: bytes = reply.read()
    except (OSError, ValueError, HTTPException) as error:  # the last: it ended in the middle
        raise InputError(
            f"The prompts {name} ({found.what}) cannot be downloaded now ({error}); get {found.address} and give that"
            " file."
        ) from error
    if (lines := sum(bool(line.strip()) for line in content.splitlines())) != found.count:
        raise InputError(f"What {found.address} holds is not {name}: it has {lines} lines in place of {found.count}.")
    try:
        replace_file(path, content)
    except OSError as error:
        raise InputError(
            f"The prompts {name} cannot be kept in {path.parent} ({error.strerror}); set XDG_CACHE_HOME to a folder"
            " that can be written."
        ) from error
    return path
