"""`fourbit bench --shape`: the sections of whole models, for one shape, on the device at hand. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fourbit.bench import environment, rows
from fourbit.bench.device import driver, summary
from fourbit.bench.device.cases import decode_weight_bytes
from fourbit.bench.device.sections import chosen
from fourbit.bench.device.settings import ROWS, Settings
from fourbit.bench.run import Run
from fourbit.errors import InputError
from fourbit.models.shapes import shape_of

__all__ = ["WHAT", "check", "measure", "plan"]

WHAT = ("step", "decode", "memory")
"""What can be measured of a shape."""

MINUTES = 240.0


def check(shape: str, layers: int | None, what: Sequence[str] | None, *, gpu: bool) -> None:
    """Refuse before anything is allocated.

    Raises:
        InputError: an unknown shape or word, a depth that the shape does not have, or too little memory.
    """
    found = shape_of(shape)
    depth = found.settings["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= depth:
        raise InputError(f"{shape} has {depth} layers, and {layers} were asked for; take 1 or more of them.")
    for word in what or ():
        if word not in WHAT:
            raise InputError(f"Of a shape, {word!r} cannot be measured; choose from {', '.join(WHAT)}.")
    embeddings = 0 if found.settings["tie_word_embeddings"] else 2 * found.head_parameters
    needed = decode_weight_bytes(found, four_bits=True, layers=layers) + embeddings
    free = environment.free_memory_bytes(gpu=gpu)
    if free is not None and needed > free:
        raise InputError(
            f"The weights of {shape} take {needed / 1e9:.1f} GB in 4 bits, and {free / 1e9:.1f} GB are free"
            f" {'on the GPU' if gpu else 'here'}; take a smaller shape, or fewer layers with --layers."
        )


def plan(shape: str, what: Sequence[str] | None, peers: Sequence[str]) -> dict[str, list[str]]:
    """The sections that would run, and their contenders where each has its own."""
    return {
        one.name: list(one.arguments)
        for one in chosen(list(what or WHAT), [shape], quick=False)
        if one.needs is None or one.needs in peers
    }


def measure(
    shape: str,
    *,
    layers: int | None,
    what: Sequence[str] | None,
    peers: Sequence[str],
    repeats: int | None,
    quick: bool,
    device_name: str,
    tell: Callable[[str], None],
) -> Run:
    """Run the sections of a shape.

    Args:
        device_name: of the GPU; empty for the CPU.
        quick: one sample of a few tokens.
        tell: is given a line after each section.
    """
    gpu = bool(device_name)
    batch, length, rank = (1, 16, 4) if quick else (16, 512, 64) if gpu else (4, 256, 16)
    with tempfile.TemporaryDirectory(prefix="fourbit-bench-") as folder:
        settings = Settings(
            folder=folder,
            device="cuda" if gpu else "cpu",
            quick=quick,
            samples=repeats or (1 if quick else 7 if gpu else 3),
            peers=tuple(peers),
            batch=batch,
            length=length,
            rank=rank,
            layers=layers,
            facts=environment.facts() | {"device": device_name},
        )
        sections = chosen(list(what or WHAT), [shape], quick=False)
        patient = [one.patient(MINUTES * 60) for one in sections]
        driver.run(patient, settings, minutes=MINUTES, environment={}, tell=tell)
        found = rows.read(Path(folder) / ROWS) if (Path(folder) / ROWS).exists() else []
        return Run(found, list(summary.notes(Path(folder))))
