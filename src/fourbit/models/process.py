"""What this process holds."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["available_bytes", "peak_resident_bytes"]


def peak_resident_bytes() -> int:
    """The largest resident size of this process so far; 0 where the system does not tell.

    On Linux `getrusage` would count the parent's size at the start of this process, so it is asked only elsewhere.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int | None:
    """The memory of this machine that could still be allocated; None where the system does not tell."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
