"""The GPU backend: Triton kernels."""

from __future__ import annotations

__all__ = ["describe", "unavailable"]


def unavailable() -> str | None:
    """Why this backend cannot run here; None if it can."""
    return None


def describe() -> str:
    """What it runs on, for `fourbit doctor`."""
    return "Triton"
