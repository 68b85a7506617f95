"""kill -9 at random moments: every run that is taken up ends with the bits of the one that nothing disturbed.

`make faults` kills 200 times in each way; the ordinary suite a few times. Each run is killed, taken up, killed again
and so on, until one of its parts gets to the end; that is compared, and the next one begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLS = int(os.environ.get("FOURBIT_FAULTS_KILLS", "3"))
MOST_KILLS_OF_ONE_RUN = 12  # one that is always killed in its first step would never end

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
def test_a_killed_run_ends_with_the_same_bits(
    packing: bool,
    killer: Any,
    outcome: Callable[[Path], dict[str, Any]],
    stories_model: Path,
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = {
        "model": str(stories_model),
        "data": str(shared_data / "alpaca" / "alpaca_100.json"),
        "limit": 40,
        "max_length": 96,
        "packing": packing,
        "lora_r": 8,
        "lora_dropout": 0.2,
        "max_steps": 8,
        "save_steps": 2,
        "eval_steps": 4,
        "eval_size": 4,
        "samples": 1,
        "sample_tokens": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "extra": {"metric_for_best_model": "eval_loss", "greater_is_better": False},
    }
    killer.finish({**config, "output": str(tmp_path / "warm")})
    killer.seconds = killer.finish({**config, "output": str(tmp_path / "whole")})
    expected = outcome(tmp_path / "whole")
    killer.moments.clear()
    runs = 0
    while killer.moments.total() < KILLS:
        told = {**config, "output": str(tmp_path / f"run-{runs}")}
        kills = 0
        while kills < MOST_KILLS_OF_ONE_RUN and killer.moments.total() < KILLS:
            kill = killer.random.choice([killer.kill_at_random, killer.kill_at_random, killer.kill_while_saving])
            if not kill(told):
                break
            kills += 1
        killer.finish(told)
        found = outcome(Path(told["output"]))
        assert _differences(expected, found) == []
        runs += 1
    with capsys.disabled():
        moments = ", ".join(f"{count} {moment}" for moment, count in killer.moments.most_common())
        print(f"\n{killer.moments.total()} kills in {runs} runs of {killer.seconds:.1f} s: {moments}")


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """The names of what is not the same, those of the metrics with their values."""
    named = [name for name in expected if name != "metrics" and found[name] != expected[name]]
    before, after = expected["metrics"], found["metrics"]
    return named + [f"{key}: {before.get(key)} {after.get(key)}" for key in before if before[key] != after.get(key)]
