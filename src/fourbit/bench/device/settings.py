"""What a section is told, and where it leaves what it finds. Importing this imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fourbit.bench import rows, run
from fourbit.bench.case import Case

__all__ = ["CHECKS", "LOG", "NOTES", "ROWS", "Ledger", "Settings"]

ROWS, NOTES, CHECKS, LOG = "bench-device.csv", "notes.txt", "checks.json", "log.txt"
"""The files in the folder of results."""


@dataclass(frozen=True)
class Settings:
    """What a section is told.

    Attributes:
        folder: for the results.
        device: "cuda" or "cpu".
        backend: that our operations are demanded of; "auto" takes what a user would get.
        quick: tiny shapes and few samples: does it run at all?
        samples: of each contender.
        peers: packages to compare with.
        batch, length, rank: of a training step.
        layers: of the model to keep, None for all.
        facts: the columns that all rows of a run share.
    """

    folder: str
    device: str = "cuda"
    backend: str = "auto"
    quick: bool = False
    samples: int = 7
    peers: tuple[str, ...] = ()
    batch: int = 16
    length: int = 512
    rank: int = 64
    layers: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """For the command line of a section's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Undoes `to_json`."""
        found = json.loads(text)
        return cls(**found | {"peers": tuple(found["peers"])})


class Ledger:
    """Keeps rows and notes the moment they are known, so that nothing is lost with a process."""

    def __init__(self, settings: Settings) -> None:
        self._facts, self._folder = settings.facts, Path(settings.folder)

    def add(self, case: Case, taken: Mapping[str, run.Samples], *, without: Collection[str] = ()) -> None:
        """Write a row for each contender of a case that has samples, but for those `without`."""
        measured = [
            one for one in case.contenders if one.name in taken and taken[one.name].seconds and one.name not in without
        ]
        found = [run.as_row(self._facts, case, one, taken, None) for one in measured]
        rows.append(self._folder / ROWS, found)
        for row in found:
            share = "" if row.share is None else f"  {row.share:.0%} of {row.share_of.partition(' ')[2]}"
            print(f"{case.name}: {row.contender}: {row.median:.4g} {row.unit}{share}", flush=True)
        for sentence in run.disagreements(case, found):
            self.note(sentence)

    def note(self, sentence: str) -> None:
        """Write down a sentence about what was left out or looks wrong."""
        print(sentence, flush=True)
        with (self._folder / NOTES).open("a", encoding="utf-8") as file:
            file.write(" ".join(sentence.split()) + "\n")
