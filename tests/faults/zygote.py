"""Starts training runs that somebody else kills: it imports everything once, and forks for each run.

So the time of a run is its own work, and a kill at a random moment of it hits no import. One JSON object a line comes
in, {"config": {...}, "log": PATH}; the process number goes out, and its exit status when it has ended.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import torch

import fourbit.train.callback
import fourbit.train.material
import fourbit.train.model
import fourbit.train.report
import fourbit.train.run
import fourbit.train.samples
import fourbit.train.trainer  # noqa: F401
from fourbit.train import TrainConfig, train


def run(order: dict[str, Any]) -> None:
    """In the forked process: one run, taken up where there is something to take up."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        status = 0 if train(TrainConfig(**order["config"]), resume=True).finished else 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Until there are no more orders."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(status, flush=True)


if __name__ == "__main__":
    main()
