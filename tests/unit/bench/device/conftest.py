"""Settings of a section in miniature, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourbit.bench import environment
from fourbit.bench.device.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    facts: dict[str, Any] = environment.facts()
    return Settings(
        folder=str(tmp_path),
        device="cpu",
        quick=True,
        samples=1,
        peers=("bitsandbytes",),
        batch=2,
        length=16,
        rank=4,
        facts=facts,
    )
