"""The CPU backend: C++ with SIMD levels chosen at run time, called through ctypes. See csrc/fourbit.h."""

from __future__ import annotations

from fourbit.kernels.native import library

__all__ = ["describe", "devices", "unavailable"]


def unavailable() -> str | None:
    """Why this backend cannot run here; None if it can.

    Raises:
        InputError: FOURBIT_CPU names a level that this machine does not have.
    """
    found = library.load()
    return found if isinstance(found, str) else None


def devices() -> tuple[str, ...]:
    """Device types whose tensors the kernels take."""
    return ("cpu",)


def describe(stem: str = "") -> str:
    """What it runs on, for `fourbit doctor`; the same for every stem."""
    return f"{library.level()}, {library.threads()} threads"
