"""What a row says of the machine."""

from __future__ import annotations

import platform
import re
import time

import pytest

import fourbit
from fourbit.bench import environment


def test_the_machine() -> None:
    assert environment.cpu_name()
    assert environment.cores() >= 1
    assert environment.memory_bytes() > 2**30
    assert 2**20 <= environment.last_level_cache_bytes() < 2**32


def test_versions() -> None:
    found = environment.versions()
    assert found["fourbit"] == fourbit.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"].startswith("2.")


def test_commit() -> None:
    assert re.fullmatch(r"([0-9a-f]{10,}\+?)?", environment.commit())


def test_our_own_work_is_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 40.0, 10.0), (110.0, 48.0, 15.0)])
    monkeypatch.setattr(environment.Disturbance, "_readings", staticmethod(lambda: next(readings)))
    assert environment.Disturbance().share() == pytest.approx(0.3)


def test_a_disturbance_is_a_part() -> None:
    disturbance = environment.Disturbance()
    time.sleep(0.1)
    share = disturbance.share()
    assert share is None or 0 <= share <= 1
