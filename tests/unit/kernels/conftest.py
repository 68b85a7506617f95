"""Running a test on every backend and level that this machine has.

Triton's kernels run in its interpreter on the CPU where torch sees no GPU (the suite's conftest asks for it); where it
sees one, `tests/gpu` runs them compiled and they are left out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fourbit.kernels import dispatch
from fourbit.kernels import triton as triton_backend
from fourbit.kernels.native import library, unavailable
from fourbit.kernels.triton import launch

LEVELS = library.levels() if unavailable() is None else ()


def _without_triton() -> str | None:
    if not launch.interpreted():
        return "its kernels are not interpreted here: tests/gpu runs them on the GPU"
    return triton_backend.unavailable()


TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(_without_triton() is not None, reason=f"Triton: {_without_triton()}")
)


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Force the reference, Triton, or native at a level."""
    if backend in ("reference", "triton"):
        with dispatch.use(backend):
            yield
        return
    before = library.level()
    library.set_level(backend)
    try:
        with dispatch.use("native"):
            yield
    finally:
        library.set_level(before)


@pytest.fixture(params=["reference", *LEVELS, TRITON])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, native at each level of this CPU, and Triton."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=["reference", "auto", TRITON])
def choice(request: pytest.FixtureRequest) -> str:
    """What `dispatch.use` and FOURBIT_BACKEND take, for tests that force it for a part of themselves."""
    name: str = request.param
    return name


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native at each level of this CPU."""
    with running(request.param):
        yield request.param
