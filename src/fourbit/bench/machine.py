"""What the machine itself can do: the limits that every other number is held against.

A case that reports a share of a limit carries the limit along as one more contender, so that both are measured in turns
within the same minute: bandwidth on a shared machine changes from one minute to the next.
"""

from __future__ import annotations

from fourbit.bench.case import LIMIT, Case, Contender, Measure, Task

__all__ = ["COPY", "GEMM_BF16", "READ", "cases", "copy_limit", "gemm_limit", "read_limit"]

COPY, READ, GEMM_BF16 = f"{LIMIT} copy", f"{LIMIT} read", f"{LIMIT} GEMM bf16"


def cases(quick: bool) -> tuple[Case, ...]:
    """One case: the limits side by side."""
    size_bytes, side = (1 << 20, 256) if quick else (1 << 30, 4096)
    fill_bytes = 1 << 20 if quick else 32 << 20
    filled = Measure("GB/s", fill_bytes / 1e9)
    return (
        Case(
            name="machine",
            title=f"the machine: {size_bytes >> 20} MiB copied or read, GEMM {side}³, {fill_bytes >> 20} MiB filled",
            measure=Measure("GB/s", 2 * size_bytes / 1e9),
            contenders=(
                copy_limit(size_bytes),
                read_limit(size_bytes),
                gemm_limit(side, "bfloat16"),
                gemm_limit(side, "float32"),
                Contender(f"{LIMIT} fill, fresh memory", lambda _: _fill(fill_bytes, fresh=True), measure=filled),
                Contender(f"{LIMIT} fill, reused memory", lambda _: _fill(fill_bytes, fresh=False), measure=filled),
            ),
            repeats=1 if quick else 5,
            sample_s=0 if quick else 0.2,
        ),
    )


def copy_limit(size_bytes: int = 1 << 30) -> Contender:
    """GB/s read and written together, copying a buffer far larger than any cache."""
    return Contender(COPY, lambda _: _copy(size_bytes), measure=Measure("GB/s", 2 * size_bytes / 1e9))


def read_limit(size_bytes: int = 1 << 30) -> Contender:
    """GB/s read, summing a buffer far larger than any cache."""
    return Contender(READ, lambda _: _read(size_bytes), measure=Measure("GB/s", size_bytes / 1e9))


def gemm_limit(side: int = 4096, dtype: str = "bfloat16") -> Contender:
    """GFLOP/s of torch's matrix product of two square matrices into a given one."""
    name = GEMM_BF16 if dtype == "bfloat16" else f"{LIMIT} GEMM fp32"
    return Contender(name, lambda _: _gemm(side, dtype), measure=Measure("GFLOP/s", 2 * side**3 / 1e9))


def _copy(size_bytes: int) -> Task:
    import torch

    source, target = torch.ones(size_bytes, dtype=torch.uint8), torch.zeros(size_bytes, dtype=torch.uint8)
    return Task(lambda: target.copy_(source), lambda _: float(target[-1]))


def _read(size_bytes: int) -> Task:
    import torch

    source = torch.ones(size_bytes // 8, dtype=torch.int64)
    return Task(source.sum, float)


def _gemm(side: int, dtype: str) -> Task:
    import torch

    a, b = (torch.randn(side, side).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return Task(lambda: torch.mm(a, b.t(), out=out), lambda _: float(out.float().norm()))


def _fill(size_bytes: int, *, fresh: bool) -> Task:
    import torch

    buffer = torch.zeros(size_bytes, dtype=torch.uint8)
    if fresh:
        return Task(lambda: torch.empty(size_bytes, dtype=torch.uint8).fill_(1), lambda result: float(result[-1]))
    return Task(lambda: buffer.fill_(1), lambda result: float(result[-1]))
