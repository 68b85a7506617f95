"""Rows made up for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fourbit.bench.rows import Row


@pytest.fixture
def row() -> Callable[..., Row]:
    """Makes a row; what is not given is the same for all."""

    def make(contender: str, median: float, **changes: Any) -> Row:
        values: dict[str, Any] = {
            "run": "2026-01-02T03:04:05Z",
            "commit": "abc1234567",
            "cpu": "a processor",
            "cores": 2,
            "memory_bytes": 24 * 10**9,
            "kernel": "Linux 6",
            "level": "avx2",
            "fourbit": "0.1",
            "python": "3.11",
            "torch": "2.13",
            "transformers": "5",
            "peft": "1",
            "bitsandbytes": "",
            "case": "quantize-nf4",
            "contender": contender,
            "unit": "M elements/s",
            "median": median,
            "minimum": 0.5 * median,
            "maximum": 2 * median,
            "samples": 7,
            "rounds": 1,
            "share": None,
            "share_of": "",
            "ready_rss_bytes": 10**8,
            "peak_rss_bytes": 2 * 10**8,
            "check": 1.0,
            "others": 0.01,
        }
        return Row(**values | changes)

    return make
