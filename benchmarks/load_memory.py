"""What loading holds beyond the model: `fourbit.load` of a random 1.1 B-parameter LLaMA.

From bf16 to NF4 with double quantization. Resident and anonymous memory, sampled every millisecond in a process that
has loaded a tiny model before, so that libraries do not count. Needs 2.2 GB of disk, a minute, and Linux' /proc.

    python benchmarks/load_memory.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import fourbit
from fourbit.bench import load as case
from fourbit.nn import QuantLinear


def main() -> None:
    """Write the checkpoint, then load it in a process of its own."""
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        case._write_full(Path(folder))
        subprocess.run([sys.executable, __file__, folder], check=True, stderr=subprocess.DEVNULL)


def measure(folder: Path) -> None:
    """Load once and print the peaks, in 10⁶ bytes."""
    fourbit.load(folder / "warmup", fourbit.QuantConfig(), dtype=torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = {kind: resident(kind) for kind in ("VmRSS", "RssAnon")}
    anonymous, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            anonymous[0] = max(anonymous[0], resident("RssAnon"))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = fourbit.load(folder / "model", fourbit.QuantConfig(), dtype=torch.bfloat16)
    done.set()
    watcher.join()
    held = sum(parameter.nbytes for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            held += sum(scale.nbytes for scale in (layer.absmax, layer.nested_absmax) if scale is not None)
    peaks = {"resident": resident("VmHWM") - before["VmRSS"], "anonymous": anonymous[0] - before["RssAnon"]}
    print(f"the model: {held / 1e6:.1f} MB")
    for kind, peak in peaks.items():
        print(f"peak {kind} memory: {peak / 1e6:.1f} MB, {(peak - held) / 1e6:.1f} MB beyond the model")


def resident(kind: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


if __name__ == "__main__":
    main()
