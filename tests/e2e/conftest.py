"""The command as a user runs it: its exit code, its stdout and its stderr."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fourbit.cli import main


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one sentence of a command that refused its input: exit code 2, stdout empty, one line on stderr."""
        assert self.code == 2, self.err
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("Error: ")
        assert line.endswith((".", "?", ")"))
        return line


@pytest.fixture
def fourbit_command(tmp_path: Path) -> Callable[..., Outcome]:
    """Runs `fourbit ARGUMENTS...` as another process in an empty folder."""

    def run(*arguments: str | Path, **environment: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "fourbit", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def fourbit_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """The same through the console script's function, in this process, where torch is imported already."""
    import rich.console  # noqa: F401  # it keeps the environment that it finds when it is imported

    monkeypatch.delenv("FOURBIT_DEBUG", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for logger in (logging.getLogger(), logging.getLogger("fourbit")):
        monkeypatch.setattr(logger, "handlers", list(logger.handlers))
        monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capfd.readouterr())

    with warnings.catch_warnings():
        yield run


@pytest.fixture(scope="session")
def adapter(stories_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter far from zero, written by peft alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(stories_model)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder
