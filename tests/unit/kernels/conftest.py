"""Running a test on every backend and level that this machine has.

Triton's kernels run in its interpreter on the CPU where torch sees no GPU (the suite's conftest asks for it); where it
sees one, `tests/gpu` runs them compiled and they are left out here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


WITHOUT_TRITON = _without_triton()


def _triton() -> Any:
    """The parameter "triton", which skips with the reason where its kernels cannot run."""
    return pytest.param("triton", marks=pytest.mark.skipif(bool(WITHOUT_TRITON), reason=f"Triton: {WITHOUT_TRITON}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` and `choice` name Triton in the tests of operations that it has a kernel for."""
    stem = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
    more = [_triton()] if importlib.util.find_spec(f"fourbit.kernels.triton.{stem}") else []
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["reference", *LEVELS, *more], indirect=True)
    if "choice" in metafunc.fixturenames:
        metafunc.parametrize("choice", ["reference", "auto", *more])


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


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, native at each level of this CPU, and Triton; see `pytest_generate_tests`."""
    with running(request.param):
        yield request.param


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Native at each level of this CPU."""
    with running(request.param):
        yield request.param
