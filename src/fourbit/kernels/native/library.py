"""Finds libfourbit.so, loads it, and hands out its functions.

The library is built when the package is installed (setup.py), and lies beside this file. Each native module binds the
functions of its stem with `bind`; their parameters are documented in csrc/fourbit.h.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fourbit.errors import InputError

__all__ = [
    "DTYPES",
    "I32",
    "I64",
    "NON_FINITE",
    "NO_MEMORY",
    "POINTER",
    "bind",
    "check",
    "keep_freed_memory",
    "level",
    "levels",
    "load",
    "release_freed_memory",
    "set_level",
    "threads",
    "workspaces",
]

ABI_VERSION = 2
"""FB_ABI_VERSION of the csrc/fourbit.h that these modules were written against."""

POINTER, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NON_FINITE, NO_MEMORY = -2, -3
_PROBLEMS = {-1: "a bad argument", NON_FINITE: "NaN or infinity", -4: "an unsupported level"}

_level: str | None = None

threads = torch.get_num_threads
"""The number of threads a kernel gets. Importing torch first also makes the library share torch's OpenMP."""


@cache
def load() -> ctypes.CDLL | str:
    """The library, or the reason there is none.

    Raises:
        InputError: FOURBIT_CPU names a level that this machine does not have.
    """
    path = Path(__file__).with_name("libfourbit.so")
    note = path.with_name("build.txt")
    if not path.exists():
        return note.read_text().strip() if note.exists() else "not built; run `python setup.py build_native`"
    try:
        library = ctypes.CDLL(str(path))
        version = library.fb_abi_version()
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return f"{path.name} is from other sources (ABI {version}, not {ABI_VERSION}); install the package again"
    for name in ("fb_level_name", "fb_level_error", "fb_supported_levels"):
        getattr(library, name).restype = ctypes.c_char_p
    if (problem := library.fb_level_error()) is not None:
        raise InputError(problem.decode())
    return library


def _loaded() -> ctypes.CDLL:
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"The native kernels are {library}.")
    return library


def bind(name: str, argtypes: Sequence[Any]) -> Callable[..., int]:
    """A function of the library that returns a status. Call it only where `load` gave a library."""
    function = _loaded()[name]
    function.argtypes, function.restype = list(argtypes), I32
    bound: Callable[..., int] = function
    return bound


def check(status: int, name: str) -> None:
    """Raise where a kernel did not return 0. Arguments are checked before, so this is our fault, not the user's.

    Raises:
        MemoryError: the system gave it no memory. RuntimeError: for any other reason.
    """
    if status == NO_MEMORY:
        raise MemoryError(f"{name} was given no memory by the system")
    if status:
        raise RuntimeError(f"{name} failed: {_PROBLEMS.get(status, f'status {status}')}.")


def level() -> str:
    """The SIMD level in use: scalar, avx2, avx512, avx512bf16 or neon."""
    global _level
    if _level is None:
        name: bytes = _loaded().fb_level_name()
        _level = name.decode()
    return _level


def levels() -> tuple[str, ...]:
    """The SIMD levels that this CPU can run, ascending."""
    names: bytes = _loaded().fb_supported_levels()
    return tuple(names.decode().split())


def set_level(name: str) -> None:
    """Change the SIMD level of the process; for tests, as FOURBIT_CPU is read only once.

    Raises:
        InputError: this machine does not have it.
    """
    global _level
    if _loaded().fb_set_level(name.encode()) != 0:
        raise InputError(f"There is no SIMD level {name} here; this machine has {', '.join(levels())}.")
    _level = name


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation, for the rest of the process.

    Memory fresh from the system fills an order of magnitude slower than memory used before, and a training step frees
    and allocates the same buffers every time. The price is that the process does not shrink.

    Returns:
        whether it was done; there is no way to on other C libraries than glibc.
    """
    library = load()
    return not isinstance(library, str) and library.fb_keep_freed_memory() == 1


_workspaces: list[threading.local] = []


def workspaces() -> threading.local:
    """Where a module keeps the buffers of each thread that its kernels use again and again."""
    made = threading.local()
    _workspaces.append(made)
    return made


def release_freed_memory() -> None:
    """Give back to the system what is free, the workspaces of this thread included; the next kernels take it anew."""
    for kept in _workspaces:
        kept.__dict__.clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
        trim(0)
