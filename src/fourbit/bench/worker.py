"""The process that one contender runs in: `python -m fourbit.bench.worker MODULE CASE CONTENDER QUICK FOLDER`.

It answers lines on its standard input with JSON lines on its standard output:

    (at start)  {"level": ..., "ready_rss_bytes": ...} when it is set up
    sample      {"seconds": per call, "check": ...}
    end         {"peak_rss_bytes": ...}, and it ends

With `fixture` in place of a contender it fills the folder and ends.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from fourbit.bench import registry
from fourbit.bench.case import OURS, Task
from fourbit.models.process import peak_resident_bytes

__all__ = ["FIXTURE", "main"]

FIXTURE = "fixture"


def main(arguments: list[str]) -> None:
    """Serve until told to end."""
    module, case_name, contender, quick, folder = arguments
    stdout = _kept_stdout()
    case = registry.find(module, case_name, quick=quick == "quick")
    if contender == FIXTURE:
        if case.fixture is not None:
            case.fixture(Path(folder))
        return
    task = case.contender(contender).setup(Path(folder))
    level = _level() if contender.startswith(OURS) else ""
    _answer(stdout, {"level": level, "ready_rss_bytes": _resident_bytes()})
    for line in sys.stdin:
        if line.strip() == "end":
            _answer(stdout, {"peak_rss_bytes": peak_resident_bytes()})
            return
        _answer(stdout, _sample(task, case.sample_s))


def _answer(stdout: TextIO, keys: dict[str, Any]) -> None:
    print(json.dumps(keys), file=stdout, flush=True)


def _sample(task: Task, sample_s: float) -> dict[str, float]:
    """Time as many calls as last `sample_s`, at least one, with the garbage collector off as `timeit` has it."""
    gc.collect()
    gc.disable()
    try:
        calls, started = 0, time.perf_counter()
        while True:
            result = task.call()
            calls += 1
            elapsed = time.perf_counter() - started
            if elapsed >= sample_s:
                break
            result = None  # freed before the next one is made, on the clock
    finally:
        gc.enable()
    return {"seconds": elapsed / calls, "check": task.check(result)}


def _level() -> str:
    """The SIMD level that our kernels run at, or why they do not."""
    from fourbit.kernels import native
    from fourbit.kernels.native import library

    missing = native.unavailable()
    if missing is not None or os.environ.get("FOURBIT_BACKEND") == "reference":
        return "reference"
    return library.level()


def _resident_bytes() -> int:
    """The resident size of this process now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmRSS:"))


def _kept_stdout() -> TextIO:
    """The real standard output; what libraries print goes to stderr from here on."""
    kept: Any = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return kept  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(sys.argv[1:])
