"""Runs sections one after the other, each in a process of its own and under its budget, and says what came of them.

Importing this imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from fourbit.bench.device.sections import Section
from fourbit.bench.device.settings import LOG, NOTES, ROWS, Ledger, Settings

__all__ = ["INTERPRETED", "PATIENCE", "Outcome", "run"]

INTERPRETED = {"TRITON_INTERPRET": "1"}
"""What lets GPU kernels run on a CPU, thousands of times slower."""

PATIENCE = 10
"""How many times its budget a section gets then."""

LEAST_S = 8.0
"""No section is begun with less time than that."""

Outcome = tuple[str, float, str]
"""A section's name, the seconds that it took, and how it ended: done, or what was wrong."""


def run(
    sections: Sequence[Section],
    settings: Settings,
    *,
    minutes: float,
    environment: Mapping[str, str],
    tell: Callable[[str], None],
) -> list[Outcome]:
    """Run sections until they are done or time is up.

    Args:
        settings: `folder` is where rows, notes and the log go; it is made if need be, and what was there is replaced.
        minutes: for all of them.
        environment: variables to set beside our own.
        tell: is given a line before and after each section.
    """
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, NOTES, LOG):
        (folder / name).unlink(missing_ok=True)
    ledger = Ledger(settings)
    ends = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    with (folder / LOG).open("a", encoding="utf-8", errors="replace") as log:
        for section in sections:
            left = ends - time.monotonic()
            if section.needs is not None and section.needs not in settings.peers:
                continue
            if left < LEAST_S:
                outcomes.append((section.name, 0.0, "no time left"))
                continue
            started = time.monotonic()
            end = _run_one(section, settings, min(section.budget_s, left), environment, log)
            outcomes.append((section.name, time.monotonic() - started, end))
            tell(f"{section.name}: {end} after {outcomes[-1][1]:.0f} s")
    for name, _, end in outcomes:
        if end != "done":
            ledger.note(f"The section {name} is not complete: {end}.")
    return outcomes


def _run_one(section: Section, settings: Settings, seconds: float, environment: Mapping[str, str], log: IO[str]) -> str:
    """How it ended."""
    print(f"=== {section.name}", file=log, flush=True)
    if not section.function:
        tests = Path.cwd() / "tests" / "gpu"
        if not tests.is_dir():
            return "there is no folder tests/gpu here"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    else:
        command = [sys.executable, "-m", "fourbit.bench.device.sections", section.function, settings.to_json()]
        command += section.arguments
    try:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **environment},
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"ended after its {seconds:.0f} s"
    if done.returncode == 0:
        return "done"
    log.flush()
    return f"exit code {done.returncode}: {_last_line(Path(log.name))}"


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return (lines[-1] if lines else "it said nothing")[:300]
