"""A judge at the wire, and answers for it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SERVER = Path(__file__).with_name("judge_server.py")


@pytest.fixture(scope="session")
def wire() -> ModuleType:
    """judge_server.py as a module."""
    spec = importlib.util.spec_from_file_location("judge_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(wire: ModuleType) -> Iterator[Any]:
    """A judge in threads of this process, well-behaved until it is told otherwise."""
    found = wire.JudgeServer()
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _no_key_of_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def answers(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes files of answers as `fourbit generate` does: one for each name, on so many prompts."""

    def write(*names: str, prompts: int = 12) -> list[Path]:
        paths = []
        for name in names:
            path = tmp_path / f"{name}.jsonl"
            records = [
                {
                    "id": number,
                    "prompt": f"What is {number} and {number}?",
                    "text": f"It is {2 * number}, says {name}.",
                    "tokens": 5,
                    "finish_reason": "stop",
                }
                for number in range(prompts)
            ]
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            paths.append(path)
        return paths

    return write


@pytest.fixture
def judge(server: Any, tmp_path: Path, fourbit_here: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `fourbit judge ... --json` against the server, with waits of milliseconds."""

    def run(*arguments: str | Path) -> Any:
        given = ["judge", *arguments, "--model", "toy", "--base-url", server.url, "--backoff", "0.002", "--json"]
        if "--patience" not in arguments:
            given += ["--patience", "20"]
        if "--output" not in arguments:
            given += ["--output", tmp_path / "ratings.jsonl"]
        return fourbit_here(*given)

    return run
