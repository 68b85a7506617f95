"""`fourbit doctor`: what this machine has, and what runs where, and why."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer

from fourbit.cli import output
from fourbit.cli.errors import OUR_FAULT
from fourbit.errors import InputError
from fourbit.words import size

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["doctor"]

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "numpy")
DEVELOPMENT = "dev"


def doctor(as_json: output.AsJson = False) -> None:
    """Show what this machine has, and what runs where and why.

    Exits with 1 where something is broken, after showing the rest.
    """
    with output.result(as_json) as show:
        found = _examine()
        show(found, lambda: _table(found))
    if found["problems"]:
        raise typer.Exit(OUR_FAULT)


def _examine() -> dict[str, Any]:
    """Every part by itself, as a doctor is called when something is broken."""
    problems: list[str] = []

    def part(examine: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return examine()
        except InputError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if problem not in problems:
                problems.append(problem)
            return otherwise

    devices = part(_devices, [])
    return {
        "versions": _versions(),
        "devices": devices,
        "backends": part(lambda: _backends(devices), {}),
        "native": part(_native, {"available": False}),
        "triton": part(_triton, {"available": False}),
        "hooks": {"peft": part(_peft_hook, "unknown")},
        "extras": _extras(),
        "advice": part(_advice, []),
        "problems": problems,
    }


def _versions() -> dict[str, str | None]:
    import fourbit

    own = {"fourbit": fourbit.__version__, "python": platform.python_version(), "system": platform.platform()}
    return own | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """The CPU, then what torch sees of accelerators."""
    import torch

    from fourbit.bench import environment

    cpu = {
        "type": "cpu",
        "name": environment.cpu_name(),
        "cores": environment.cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": environment.memory_bytes(),
    }
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        cpu,
        *(
            {
                "type": "cuda",
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "memory_bytes": gpu.total_memory,
            }
            for gpu in gpus
        ),
    ]


def _advice() -> list[str]:
    """What works, but not as well as this machine could."""
    import torch

    from fourbit.bench import environment

    there = torch.cuda.is_available()
    name, capability = (torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)) if there else (None, ())
    reason = environment.why_no_accelerator(torch.__version__, name, capability, environment.accelerators())
    return [] if reason is None else [reason]


def _backends(devices: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """On the device that models go to: the first GPU, or the CPU."""
    from fourbit.kernels import backends

    return backends(devices[-1]["type"] if devices else "cpu")


def _native() -> dict[str, Any]:
    """The C++ library: the SIMD level in use and those possible, or why it is not there."""
    from fourbit.kernels import native
    from fourbit.kernels.native import library

    missing = native.unavailable()
    if missing is not None:
        return {"available": False, "why": missing}
    return {"available": True, "level": library.level(), "levels": list(library.levels())}


def _triton() -> dict[str, Any]:
    """The GPU's kernels: what they run on, or why they cannot."""
    from fourbit.kernels import triton

    missing = triton.unavailable()
    if missing is not None:
        return {"available": False, "why": missing}
    return {"available": True, "runs": triton.describe()}


def _peft_hook() -> str:
    """Whether adapters on 4-bit layers take the fused path."""
    import peft  # noqa: F401  (until it is imported, the hook only waits for it)

    from fourbit.nn.adapters import hook_state

    return hook_state()


def _extras() -> dict[str, dict[str, str | None]]:
    """Per extra: the libraries it brings, and their versions, None where one is missing."""
    from packaging.requirements import Requirement

    if _version("fourbit") is None:  # run from sources that are not installed
        return {}
    extras = metadata.metadata("fourbit").get_all("Provides-Extra") or []
    needed = [Requirement(text) for text in metadata.requires("fourbit") or []]
    return {
        extra: {one.name: _version(one.name) for one in needed if one.marker and one.marker.evaluate({"extra": extra})}
        for extra in extras
        if extra != DEVELOPMENT
    }


def _table(found: dict[str, Any]) -> RenderableType:
    from rich.console import Group

    sections = {
        "Versions": {name: version or "not installed" for name, version in found["versions"].items()},
        "Devices": {device["type"]: _device_line(device) for device in found["devices"]},
        "Operations": {name: f"{entry['backend']}: {entry['why']}" for name, entry in found["backends"].items()},
        "Native library": {"SIMD": _native_line(found["native"])},
        "GPU kernels": {"Triton": found["triton"].get("runs") or found["triton"].get("why", "see below")},
        "Hooks": found["hooks"],
        "Extras": {f"fourbit[{name}]": _extra_line(parts) for name, parts in found["extras"].items()},
        "Advice": dict(enumerate(found["advice"], start=1)),
        "Problems": dict(enumerate(found["problems"], start=1)),
    }
    return Group(*(output.facts(title, rows) for title, rows in sections.items() if rows))


def _device_line(device: dict[str, Any]) -> str:
    if device["type"] == "cpu":
        detail = f"{device['cores']} cores, {device['threads']} threads"
    else:
        detail = f"compute capability {device['capability']}"
    return f"{device['name']}, {detail}, {size(device['memory_bytes'])}"


def _native_line(native: dict[str, Any]) -> str:
    if not native["available"]:
        return f"missing: {native.get('why', 'see below')}"
    return f"{native['level']} (this CPU can run {', '.join(native['levels'])})"


def _extra_line(parts: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in parts.items())
