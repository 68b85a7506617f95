"""Whether Triton can run here, and what every launch has in common.

A kernel is compiled by Triton when it is first launched for a set of types, and cached on disk by Triton. Its
interpreter (TRITON_INTERPRET=1, read when the kernels are decorated, so before the first import) runs the same kernels
with numpy, on tensors of any device; that is how the test suite proves them where there is no GPU.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["EXACT", "capability", "describe", "devices", "guard", "interpreted", "multiprocessors", "reason_against"]

OLDEST = (7, 0)
"""The compute capability that Triton's code generator begins at."""

EXACT = {"enable_fp_fusion": False}
"""Launch options of every kernel: a * b + c is two roundings, as in the reference, unless the kernel says `tl.fma`."""

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_reason: dict[str, str | None] = {}
_multiprocessors: dict[torch.device, int] = {}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return _INTERPRETED


def devices() -> tuple[str, ...]:
    """Device types whose tensors the kernels take. ROCm's GPUs are `cuda` to torch."""
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def reason_against() -> str | None:
    """Why the kernels cannot run here, in a sentence; None if they can. Found out once."""
    if "here" not in _reason:
        _reason["here"] = _find_reason()
    return _reason["here"]


def _find_reason() -> str | None:
    if not interpreted():
        if not torch.cuda.is_available():
            return _no_gpu()
        major, minor = torch.cuda.get_device_capability()
        if torch.version.hip is None and (major, minor) < OLDEST:
            name = torch.cuda.get_device_name()
            return (
                f"{name} has compute capability {major}.{minor} and Triton needs {OLDEST[0]}.{OLDEST[1]};"
                " plain torch runs instead"
            )
    try:
        import triton
    except ImportError as error:
        detail = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be imported ({error})"
        where = "`pip install triton` (torch's CUDA wheels for Linux bring it)"
        return f"Triton {detail}: {where}; plain torch runs instead"
    try:
        _probe()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Triton {triton.__version__} cannot compile a trivial kernel here ({first}); plain torch runs instead"
    return None


def _no_gpu() -> str:
    if shutil.which("nvidia-smi") is not None and not torch.backends.cuda.is_built():
        return (
            f"this machine has an NVIDIA GPU, but torch {torch.__version__} is built for CPUs alone: install a CUDA"
            " build of torch (https://pytorch.org/get-started)"
        )
    return "torch sees no GPU"


def _probe() -> None:
    """Compile and run what any kernel needs.

    Raises:
        Exception: whatever Triton, its compiler or the driver raise; there is no common class.
    """
    from fourbit.kernels.triton.probe import double

    where = "cpu" if interpreted() else "cuda"
    numbers = torch.arange(32, dtype=torch.float32, device=where)
    out = torch.empty_like(numbers)
    double[(1,)](numbers, out, 32, **EXACT)
    if not torch.equal(out, numbers * 2):
        raise RuntimeError("a trivial kernel computed something else")


def guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one in a `with` block, as Triton launches there; nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; what the newest has where the kernels are interpreted."""
    return (9, 0) if device.type != "cuda" else torch.cuda.get_device_capability(device)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at a time, in units of one per multiprocessor; 1 where the kernels are interpreted."""
    if device.type != "cuda":
        return 1
    if device not in _multiprocessors:
        _multiprocessors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _multiprocessors[device]


def describe() -> str:
    """Triton's version and what runs its kernels."""
    import triton

    if interpreted():
        return f"Triton {triton.__version__}, interpreted"
    major, minor = torch.cuda.get_device_capability()
    return f"Triton {triton.__version__} on {torch.cuda.get_device_name()} ({major}.{minor})"
