"""The GPU backend: Triton kernels, compiled at their first use, so that no binary of ours has to match a CUDA version.

See `launch` for where it runs, `linear` for how a product is chosen by shape. `triton` is imported under this package
only, and only when a tensor on a GPU meets an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fourbit.kernels.triton import launch
from fourbit.kernels.triton.launch import devices

__all__ = ["describe", "devices", "unavailable", "variants"]


def unavailable() -> str | None:
    """Why this backend cannot run here, in a sentence; None if it can."""
    return launch.reason_against()


def describe(stem: str = "") -> str:
    """What it runs on and, for the products, how it chooses by shape; for `fourbit doctor` and `fourbit.backends()`.

    Args:
        stem: of an operation.
    """
    where = launch.describe()
    if stem not in ("linear", "lora"):
        return where
    from fourbit.kernels.triton import linear

    return f"{where}; {linear.describe()}"


def variants() -> dict[str, dict[str, Callable[..., Any]]]:
    """Every way to run an operation that has more than one, for benchmarks: operation -> variant -> function.

    The functions take the positional arguments of the operation's schema, and raise for those they do not take.
    """
    from fourbit.kernels.triton import linear

    return linear.variants()
