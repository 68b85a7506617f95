"""What a run holds that no tensor of its model does: Python, libraries, the driver of a GPU."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CONTEXT_BYTES", "WORKING_BYTES", "baseline_bytes", "resident_bytes"]

BASELINE_BYTES = 520_000_000
"""Python 3.11 with torch 2.13 for CPUs, transformers 5.23, peft 0.21 and fourbit imported, on Linux; where the system
does not tell what this process holds."""

WORKING_BYTES = 50_000_000
"""What is added between the imports and the second step: code that is loaded when it is first used, oneDNN's kernels,
the modules of the model. Measured: 48 to 55 MB over models of 8 to 135 M parameters."""

CONTEXT_BYTES = 600_000_000
"""A CUDA context with the kernels of torch and cuBLAS that a step uses. By NVIDIA's tools on cards from Volta on it is
0.3 to 0.6 GB; taken at its upper end, since it is what is reported apart and not measured here."""


def baseline_bytes() -> int:
    """What this process holds once everything is imported that loading and training a model imports."""
    import peft
    import transformers

    import fourbit.models.loading

    del peft, transformers, fourbit
    return resident_bytes() or BASELINE_BYTES


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)
