"""Running a test on every backend and level that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fourbit.kernels import dispatch
from fourbit.kernels.native import library, unavailable

LEVELS = library.levels() if unavailable() is None else ()


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Force the reference, or native at a level."""
    if backend == "reference":
        with dispatch.use("reference"):
            yield
        return
    before = library.level()
    library.set_level(backend)
    try:
        with dispatch.use("native"):
            yield
    finally:
        library.set_level(before)


@pytest.fixture(params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, then native at each level of this CPU."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native at each level of this CPU."""
    with running(request.param):
        yield request.param
