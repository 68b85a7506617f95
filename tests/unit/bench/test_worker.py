"""What is on the clock, and what is not."""

from __future__ import annotations

import gc
import time

from fourbit.bench.case import Task
from fourbit.bench.worker import _sample


def test_a_sample_lasts_and_is_per_call() -> None:
    calls: list[bool] = []

    def call() -> int:
        calls.append(gc.isenabled())
        time.sleep(0.01)
        return len(calls)

    sample = _sample(Task(call, float), 0.05)
    assert len(calls) == sample["check"] <= 5
    assert 0.01 <= sample["seconds"] < 1
    assert not any(calls)
    assert gc.isenabled()


def test_one_call_where_no_time_is_asked_for_and_the_check_is_off_the_clock() -> None:
    calls: list[int] = []

    def check(_: object) -> float:
        time.sleep(0.2)
        return 7.0

    sample = _sample(Task(lambda: calls.append(1), check), 0)
    assert len(calls) == 1
    assert sample["check"] == 7
    assert sample["seconds"] < 0.1
