"""Which files hold cases, and under which words a user finds them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from fourbit.bench.case import Case
from fourbit.bench.peers import BITSANDBYTES, LLAMA_CPP, TORCHAO, UNSLOTH
from fourbit.errors import InputError

__all__ = ["GROUPS", "PEERS", "all_cases", "cases_of", "find"]

GROUPS = {
    "machine": ("machine",),
    "ops": ("quantize", "dequantize", "linear"),
    "load": ("load",),
    "step": ("step",),
    "optimizer": ("optimizer",),
    "decode": ("decode",),
}
"""What `--what` takes, in the order of measuring, and the modules of this package behind each word.

Each of those modules has a function `cases(quick)` that gives its cases; with `quick` they are tiny.
"""

PEERS = (BITSANDBYTES, TORCHAO, UNSLOTH, LLAMA_CPP)
"""Who we are compared with, by package."""

_MODULES = tuple(module for modules in GROUPS.values() for module in modules)


def cases_of(module: str, *, quick: bool = False) -> tuple[Case, ...]:
    """The cases in one module of this package."""
    found: tuple[Case, ...] = importlib.import_module(f"fourbit.bench.{module}").cases(quick)
    return found


def all_cases(what: Sequence[str] | None = None, *, quick: bool = False) -> list[tuple[str, Case]]:
    """The cases behind some words, each with the module it comes from.

    Args:
        what: groups, modules or single cases; None takes all.

    Raises:
        InputError: a word that stands for nothing.
    """
    pairs = [(module, case) for module in _MODULES for case in cases_of(module, quick=quick)]
    if what is None:
        return pairs
    wanted: set[str] = set()
    for word in what:
        modules = GROUPS.get(word, (word,))
        found = {case.name for module, case in pairs if module in modules or case.name == word}
        if not found:
            known = [*GROUPS, *(name for name in _MODULES if name not in GROUPS)]
            raise InputError(f"There is nothing called {word!r} to measure; choose from {', '.join(known)}.")
        wanted |= found
    return [(module, case) for module, case in pairs if case.name in wanted]


def find(module: str, name: str, *, quick: bool) -> Case:
    """One case by its module and name."""
    return next(case for case in cases_of(module, quick=quick) if case.name == name)
