"""What a run writes down: `metrics.json`, `history.jsonl`, and what else its report shows."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fourbit

__all__ = ["device_name", "history_rows", "to_jsonl", "versions"]

_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Of everything that a result can depend on."""
    found = {"fourbit": fourbit.__version__, "python": platform.python_version()}
    if commit := _commit():
        found["commit"] = commit
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the source tree that fourbit runs from; None where it was installed."""
    root = Path(fourbit.__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def device_name() -> str:
    """What the run computed on, for people."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


def history_rows(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a Trainer's log that belong to a step, without what it says at the end.

    Rows with `event` say in a `sentence` what else happened there.
    """
    return [dict(row) for row in log if {"loss", "eval_loss", "eval_mmlu", "event"} & row.keys()]


def to_jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)
