"""Runs that are killed, and what must be the same in their folders however often they were."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ZYGOTE = Path(__file__).with_name("zygote.py")
MEASURED = {"seconds", "memory_bytes", "peak_bytes", "tokens_per_second", "eval_runtime", "training_seconds"}
MEASURED |= {"planned_bytes", "planned_parts", "measured_parts"}  # the plan counts what the process holds already
"""What depends on the machine and the hour."""
OF_THE_PART = {"resumed_from", "finished_at", "output", "config", "versions"}
"""What differs between folders, or tells of the last part of a run."""


@dataclass
class Killer:
    """Starts runs and kills them.

    Attributes:
        process: the zygote.
        seconds: of a run that nothing disturbs.
        moments: what the runs were doing when they were killed -> how often.
    """

    process: subprocess.Popen[str]
    folder: Path
    random: random.Random
    seconds: float = 0.0
    moments: Counter[str] = field(default_factory=Counter)

    def finish(self, config: dict[str, Any]) -> float:
        """Let a run end; its seconds."""
        started = time.perf_counter()
        self._start(config)
        status = int(self._line())
        assert status == 0, (self.folder / "log").read_text()[-3000:]
        return time.perf_counter() - started

    def kill_at_random(self, config: dict[str, Any]) -> bool:
        """Kill a run at a moment of its working time; False if it had ended by then."""
        child = self._start(config)
        time.sleep(self.random.uniform(0, self.seconds))
        return self._kill(child, Path(config["output"]))

    def kill_while_saving(self, config: dict[str, Any]) -> bool:
        """Kill a run in the middle of one of its checkpoints; False if it ended without one more."""
        output = Path(config["output"])
        child = self._start(config)
        skipped = self.random.randrange(config["max_steps"])
        seen: set[str] = set()
        while _is_alive(child):
            seen |= {path.name for path in output.glob(".checkpoint-*.unfinished")}
            if len(seen) > skipped:
                time.sleep(self.random.uniform(0, 0.03))
                break
            time.sleep(0.001)  # writing a checkpoint takes longer, and the run needs the processor
        return self._kill(child, output)

    def _start(self, config: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"config": config, "log": str(self.folder / "log")}) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def _kill(self, child: int, output: Path) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = int(self._line())
        if os.WIFEXITED(status):
            assert status == 0, (self.folder / "log").read_text()[-3000:]
            return False
        assert os.WTERMSIG(status) == signal.SIGKILL
        self.moments[_moment(output)] += 1
        return True


def _is_alive(child: int) -> bool:
    """Whether it still runs; one that has ended stays a zombie until the zygote has looked."""
    try:
        return Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _moment(output: Path) -> str:
    """What a run was doing, by what it left."""
    if not (output / "fourbit.json").exists():
        return "before its folder was begun"
    if any(output.glob(".checkpoint-*.unfinished")):
        return "in a checkpoint"
    if any(output.glob(".*.unfinished")) or (output / "report.html").exists():
        return "while its results were written"
    if any(output.glob("checkpoint-*")):
        return "between checkpoints, or while one was taken up"
    return "before its first checkpoint"


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    """With everything imported."""
    seed = int(os.environ.get("FOURBIT_FAULTS_SEED", "0"))
    with subprocess.Popen(
        [sys.executable, str(ZYGOTE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield Killer(process, tmp_path_factory.mktemp("killer"), random.Random(seed))
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """All that must be the same in the folder of a finished run, whatever happened on the way."""
    return _outcome


def _outcome(output: Path) -> dict[str, Any]:
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]
    state = json.loads((newest / "trainer_state.json").read_text().replace(str(output), "OUTPUT"))
    return {
        "files": sorted(str(path.relative_to(output)) for path in output.rglob("*")),
        "adapter": (output / "adapter_model.safetensors").read_bytes(),
        "metrics": _timeless(json.loads((output / "metrics.json").read_text())),
        "history": [_timeless(row) for row in history],
        "samples": json.loads((output / "samples.json").read_text()),
        "checkpoint": (newest / "adapter_model.safetensors").read_bytes(),
        "trainer": {**state, "log_history": [_timeless(row) for row in state["log_history"]]},
        "meter": _timeless(json.loads((newest / "meter.json").read_text())),
        **{name: _plain(newest / name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")},
    }


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in MEASURED | OF_THE_PART}


def _plain(path: Path) -> Any:
    """What a file of torch holds, as things that compare by their bits."""

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
        if hasattr(value, "tobytes"):
            return value.tobytes()
        if isinstance(value, dict):
            return {key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

    return walk(torch.load(path, weights_only=False))
