"""What a measurement depends on: the machine, the versions, the commit. No torch is imported."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fourbit
from fourbit.bench.peers import BITSANDBYTES, LLAMA_CPP, TORCHAO, UNSLOTH
from fourbit.errors import InputError
from fourbit.models.process import available_bytes

__all__ = [
    "LIBRARIES",
    "Disturbance",
    "accelerators",
    "commit",
    "cores",
    "cpu_name",
    "facts",
    "free_memory_bytes",
    "installed_peers",
    "last_level_cache_bytes",
    "memory_bytes",
    "other_versions",
    "usable_accelerator",
    "versions",
    "why_no_accelerator",
]

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""Those with a column of their own in rows."""

OLDEST_CAPABILITY = (7, 5)
"""Of a GPU that Triton compiles for: Turing, such as the T4."""

OTHERS = ("triton", "liger-kernel", "torchao", "unsloth", "llama-cpp-python")
"""Those that share one."""


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


def other_versions() -> str:
    """What else of `OTHERS` is installed, in words."""
    return ", ".join(f"{name} {version}" for name in OTHERS if (version := _version(name)))


def free_memory_bytes(*, gpu: bool) -> int | None:
    """What could still be allocated on the first GPU, or here; None where the system does not say."""
    if gpu:
        found = _ask_driver("memory.free")
        return int(found[0].split()[0]) << 20 if found else None
    return available_bytes()


def accelerators() -> list[str]:
    """The GPUs that the driver shows, whether or not torch can use them; it is asked without torch."""
    return _ask_driver("name")


def _ask_driver(question: str) -> list[str]:
    """An answer per GPU."""
    command = ["nvidia-smi", f"--query-gpu={question}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def usable_accelerator() -> str:
    """The name of the GPU that torch computes on. torch is asked in a process of its own, to keep this one small.

    Raises:
        InputError: there is none; says why, and what to do.
    """
    program = (
        "import json, torch; ok = torch.cuda.is_available();"
        " print(json.dumps([torch.__version__, ok and torch.cuda.get_device_name(0),"
        " list(torch.cuda.get_device_capability(0)) if ok else []]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(f"torch cannot be imported here: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}.")
    version, name, capability = json.loads(done.stdout)
    seen = accelerators()
    reason = why_no_accelerator(version, name, tuple(capability), seen)
    if reason is not None:
        raise InputError(f"{reason} `fourbit bench --what ops` measures the CPU.")
    if not name:
        raise InputError("There is no GPU here; --interpret tries the script on the CPU, `fourbit bench` measures it.")
    return str(name)


def why_no_accelerator(
    torch_version: str, name: str | None, capability: tuple[int, ...], seen: Sequence[str]
) -> str | None:
    """Why the GPU of this machine is not used, and what to do; None where it is, or where there is none.

    Args:
        torch_version: such as 2.11.0+cpu.
        name, capability: of the first GPU that torch sees; None and () without one.
        seen: the GPUs that the driver shows.
    """
    if name and capability < OLDEST_CAPABILITY:
        return (
            f"{name} has compute capability {'.'.join(map(str, capability))}, and Triton compiles for"
            f" {'.'.join(map(str, OLDEST_CAPABILITY))} and newer: on it everything runs on the reference, slowly."
        )
    if name or not seen:
        return None
    if "+cpu" in torch_version:
        return (
            f"There is a GPU ({seen[0]}), but torch {torch_version} is built for CPUs; install the build for CUDA, as"
            " https://pytorch.org/get-started/locally says."
        )
    return (
        f"There is a GPU ({seen[0]}), but torch {torch_version} cannot use it: its driver is too old, or"
        " CUDA_VISIBLE_DEVICES hides it."
    )


def installed_peers(*, gpu: bool) -> list[str]:
    """The packages to compare with that are installed, and that run on such a device."""
    names = (BITSANDBYTES, TORCHAO, UNSLOTH) if gpu else (BITSANDBYTES, TORCHAO, LLAMA_CPP)
    return [name for name in names if find_spec(name) is not None]


def facts() -> dict[str, Any]:
    """The columns that all rows of a run share; see `bench.rows`."""
    return {
        "run": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "kernel": f"{platform.system()} {platform.release()}",
        **versions(),
        "libraries": other_versions(),
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
