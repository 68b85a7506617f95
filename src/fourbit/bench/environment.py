"""What a measurement depends on: the machine, the versions, the commit. No torch is imported."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import fourbit

__all__ = [
    "LIBRARIES",
    "Disturbance",
    "commit",
    "cores",
    "cpu_name",
    "last_level_cache_bytes",
    "memory_bytes",
    "versions",
]

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def cpu_name() -> str:
    """The processor: its name, and family and model where the name alone says little."""
    fields = _cpu_fields()
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def last_level_cache_bytes() -> int:
    """The largest cache of the first processor; 32 MiB where the system does not say."""
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            found.append(int(text[:-1]) << 10)
    return max(found)


class Disturbance:
    """How much of the processors others took since this was made: other processes, and other virtual machines."""

    def __init__(self) -> None:
        self._start = self._readings()

    def share(self) -> float | None:
        """0 to 1; None where the system does not say. Only ended child processes count as ours."""
        start, now = self._start, self._readings()
        if start is None or now is None:
            return None
        elapsed, busy, ours = (after - before for before, after in zip(start, now, strict=True))
        return min(1.0, max(0.0, (busy - ours) / elapsed)) if elapsed > 0 else None

    @staticmethod
    def _readings() -> tuple[float, float, float] | None:
        """Seconds of all processors so far: in all, busy, and busy for us."""
        path = Path("/proc/stat")
        if not path.exists():
            return None
        # user, nice, system, idle, waiting, interrupts (2), taken by the hypervisor; guests are within user
        ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in path.read_text().splitlines()[0].split()[1:9]]
        used = os.times()
        ours = used.user + used.system + used.children_user + used.children_system
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], ours


def versions() -> dict[str, str]:
    """fourbit, Python, and the libraries that matter; empty where one is not installed."""
    return {
        "fourbit": fourbit.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def commit() -> str:
    """The commit that this package runs from, with `+` where files differ from it; empty outside a checkout."""
    root = Path(fourbit.__file__).parent
    named = _git(root, "rev-parse", "--short=10", "HEAD")
    return named and f"{named}{'+' if _git(root, 'status', '--porcelain', '--untracked-files=no') else ''}"


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_fields() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
