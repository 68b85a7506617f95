"""A step of AdamW on the CPU, with fp32 parameters: everything in memory, or half of the states elsewhere.

fourbit                     `fourbit.optim.PagedAdamW` without a budget
fourbit, half in pages      a budget of half its states; the others in another part of memory
fourbit, half in a file     the same, the others in a file, which this system may keep in its page cache
torch, fused; torch, foreach        `torch.optim.AdamW`
bitsandbytes                its AdamW32bit or AdamW8bit; `paged` is its PagedAdamW, which on a CPU does not page
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fourbit.bench.case import OURS, Bar, Case, Contender, Measure, Task
from fourbit.bench.peers import BITSANDBYTES

__all__ = ["cases"]

FUSED, FOREACH, PAGED = "torch, fused", "torch, foreach", f"{BITSANDBYTES}, paged"
HALF, IN_A_FILE = f"{OURS}, half in pages", f"{OURS}, half in a file"
LORA_MATRICES = 448
"""Of LLaMA 7B with adapters on all linear layers."""

Shapes = Sequence[tuple[int, ...]]


def cases(quick: bool) -> tuple[Case, ...]:
    """32-bit states of one large parameter and of many small ones, and 8-bit states."""
    side = 256 if quick else 4096
    matrices: Shapes = [(16, 16 if quick else 256)] * (4 if quick else LORA_MATRICES)
    return (
        _case(
            "adamw",
            f"AdamW with 32-bit states: one parameter {side} × {side} in fp32",
            [(side, side)],
            [
                (HALF, _half(4, "device")),
                (IN_A_FILE, _half(4, "file")),
                (FUSED, _torch(fused=True)),
                (FOREACH, _torch(foreach=True)),
                (BITSANDBYTES, _bitsandbytes("AdamW32bit")),
                (PAGED, _bitsandbytes("PagedAdamW32bit")),
            ],
            bars=(Bar("speed", FUSED, 0.9), Bar("speed", BITSANDBYTES, 5.0)),
            quick=quick,
        ),
        _case(
            "adamw-many",
            f"AdamW with 32-bit states: {len(matrices)} LoRA matrices {matrices[0][0]} × {matrices[0][1]} in fp32",
            matrices,
            [
                (FUSED, _torch(fused=True)),
                (FOREACH, _torch(foreach=True)),
                (BITSANDBYTES, _bitsandbytes("AdamW32bit")),
            ],
            bars=(Bar("speed", FUSED, 0.9),),
            quick=quick,
        ),
        _case(
            "adamw-8bit",
            f"AdamW with 8-bit states: one parameter {side} × {side} in fp32",
            [(side, side)],
            [
                (HALF, _half(1, "device", state_bits=8)),
                (IN_A_FILE, _half(1, "file", state_bits=8)),
                (BITSANDBYTES, _bitsandbytes("AdamW8bit")),
                (PAGED, _bitsandbytes("PagedAdamW8bit")),
            ],
            bars=(Bar("speed", BITSANDBYTES, 5.0),),
            quick=quick,
            state_bits=8,
        ),
    )


Make = Callable[[list[Any], Path], Any]
"""An optimizer of parameters; the folder is for what it may put on disk."""


def _case(
    name: str,
    title: str,
    shapes: Shapes,
    others: Sequence[tuple[str, Make]],
    *,
    bars: tuple[Bar, ...],
    quick: bool,
    **ours: Any,
) -> Case:
    def needs(contender: str) -> str | None:
        return BITSANDBYTES if contender.startswith(BITSANDBYTES) else None

    def setup(make: Make) -> Callable[[Path], Task]:
        return lambda folder: _task(shapes, make, folder)

    made = [(OURS, _ours(**ours)), *others]
    elements = sum(rows * columns for rows, columns in shapes)
    return Case(
        name=name,
        title=title,
        measure=Measure("M parameters/s", elements / 1e6),
        contenders=tuple(Contender(one, setup(make), needs=needs(one)) for one, make in made),
        bars=bars,
        repeats=1 if quick else 7,
        rounds=1 if quick else 2,
        sample_s=0 if quick else 0.2,
    )


def _task(shapes: Shapes, make: Make, folder: Path) -> Task:
    """Steps with the same gradients each time, and a rate so small that their number shows in no result."""
    import torch

    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer = make(params, folder)
    return Task(optimizer.step, lambda _: float(sum(param.detach().norm() for param in params)))


RATE = 1e-7


def _ours(**settings: Any) -> Make:
    def make(params: list[Any], _: Path) -> Any:
        from fourbit.optim import PagedAdamW

        return PagedAdamW(params, lr=RATE, **settings)

    return make


def _half(bytes_per_parameter: int, where: str, **settings: Any) -> Make:
    """Half of the two moments, of so many bytes each."""

    def make(params: list[Any], folder: Path) -> Any:
        budget = bytes_per_parameter * sum(param.numel() for param in params)
        if where == "device":
            return _ours(device_budget_bytes=budget, **settings)(params, folder)
        return _ours(host_budget_bytes=budget, folder=folder, **settings)(params, folder)

    return make


def _torch(*, fused: bool = False, foreach: bool = False) -> Make:
    def make(params: list[Any], _: Path) -> Any:
        import torch

        return torch.optim.AdamW(params, lr=RATE, fused=fused, foreach=foreach)

    return make


def _bitsandbytes(name: str) -> Make:
    def make(params: list[Any], _: Path) -> Any:
        import warnings

        import bitsandbytes

        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        return getattr(bitsandbytes.optim, name)(params, lr=RATE)

    return make
