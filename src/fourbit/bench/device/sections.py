"""The sections in the order of running, what each may take, and the process that one runs in.

`python -m fourbit.bench.device.sections NAME SETTINGS` runs one. Importing this imports no torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from fourbit.bench.case import OURS
from fourbit.bench.device import cases
from fourbit.bench.device.settings import Ledger, Settings
from fourbit.bench.peers import BITSANDBYTES, UNSLOTH
from fourbit.errors import InputError

__all__ = ["KINDS", "Section", "chosen", "has_gpu_kernels", "main", "sections"]

KINDS = ("machine", "checks", "tests", "ops", "step", "decode", "memory", "paging", "parity")
"""What a user can ask for."""

STEP_SHAPE = "llama-7b"
DECODE_SHAPES = ("llama-7b", "llama-33b", "llama-65b")
PAGING_SHAPES = ("llama-33b",)
MEMORY_SHAPES = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")


@dataclass(frozen=True)
class Section:
    """One process.

    Attributes:
        name: unique.
        kind: one of `KINDS`.
        function: "module.function" in this package; it takes settings, ledger and `arguments`. Empty: the suite's own
            tests of compiled kernels, by pytest.
        arguments: for the function.
        budget_s: after so many seconds it is ended.
        needs: a package without which it is left out.
    """

    name: str
    kind: str
    function: str
    arguments: tuple[str, ...] = ()
    budget_s: float = 60
    needs: str | None = None

    def patient(self, budget_s: float) -> Section:
        """The same with another budget."""
        return replace(self, budget_s=budget_s)


def sections(shapes: Sequence[str] | None = None, *, quick: bool = False) -> tuple[Section, ...]:
    """All of them.

    Args:
        shapes: of the model-sized sections; None takes those of the bars.
        quick: the tiny shape in place of the bars' ones.
    """
    bars = shapes is None and not quick
    wanted = tuple(shapes or ("tiny",))
    step_shapes = (STEP_SHAPE,) if bars else wanted
    return (
        Section("machine", "machine", "ops.machine", budget_s=40),
        Section("checks", "checks", "checks.run", budget_s=90),
        Section("parity", "parity", "parity.parity", budget_s=45),
        Section("ops-matrix-vector", "ops", "ops.matrix_vector", budget_s=60),
        Section("ops-dequantize", "ops", "ops.dequantize", budget_s=45),
        Section("ops-quantize", "ops", "ops.quantize", budget_s=45),
        Section("ops-small-batches", "ops", "ops.small_batches", budget_s=60),
        Section("ops-large", "ops", "ops.large", budget_s=45),
        *_steps(step_shapes, OURS),
        *_steps(step_shapes, cases.BNB_LEAN, BITSANDBYTES),
        *_steps(step_shapes, cases.PEFT_LORA),
        *_of_shapes("decode", "decode.decode", DECODE_SHAPES if bars else wanted),
        *_of_shapes("memory", "models.memory", MEMORY_SHAPES if bars else wanted),
        *_of_shapes("paging", "paging.paging", PAGING_SHAPES if bars else wanted, budget_s=120),
        *_steps(step_shapes, cases.UNSLOTH_STEP, UNSLOTH),
        *_steps(step_shapes, cases.OUR_LORA),
        Section("tests", "tests", "", budget_s=120),
    )


def _steps(shapes: Sequence[str], contender: str, needs: str | None = None) -> list[Section]:
    """Those without which a bar cannot be judged come first, the rest when time is left."""
    short = contender.replace(" ", "").replace(",", "-")
    budget_s = 120 if contender == cases.UNSLOTH_STEP else 75  # it reads a folder, and compiles
    return [
        Section(f"step-{shape}-{short}", "step", "models.step", (shape, contender), budget_s, needs) for shape in shapes
    ]


def _of_shapes(kind: str, function: str, shapes: Sequence[str], budget_s: float = 75) -> list[Section]:
    return [Section(f"{kind}-{shape}", kind, function, (shape,), budget_s) for shape in shapes]


def chosen(kinds: Sequence[str] | None, shapes: Sequence[str] | None, *, quick: bool) -> list[Section]:
    """The sections of some kinds; None takes all.

    Raises:
        InputError: a kind that does not exist.
    """
    for kind in kinds or ():
        if kind not in KINDS:
            raise InputError(f"There is no section called {kind!r}; choose from {', '.join(KINDS)}.")
    return [one for one in sections(shapes, quick=quick) if kinds is None or one.kind in kinds]


def has_gpu_kernels() -> bool:
    """Whether there is a Triton backend, and a Triton to run it."""
    return all(find_spec(name) is not None for name in ("fourbit.kernels.triton", "triton"))


def main(arguments: Sequence[str]) -> None:
    """Run one section."""
    home, function = arguments[0].rsplit(".", 1)
    settings = Settings.from_json(arguments[1])
    if cases.UNSLOTH_STEP in arguments[2:]:
        importlib.import_module(UNSLOTH)  # it patches transformers, so it has to come first
    module = importlib.import_module(f"fourbit.bench.device.{home}")
    getattr(module, function)(settings, Ledger(settings), *arguments[2:])


if __name__ == "__main__":
    main(sys.argv[1:])
