"""A section that proves before anything is timed: every operation on this device against the reference.

Codes, scales and decoded values have to be equal, bit for bit. Products have to lie within the bound that their
contract derives, around the product of the decoded weight in fp64:

    |y - y*| <= (2 u + K 2^-24) |x| |W|^T + u |y*|,     u = half a unit in the last place of the dtype
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fourbit
from fourbit.bench.device.ops import variants
from fourbit.bench.device.settings import CHECKS, Ledger, Settings
from fourbit.kernels import dispatch
from fourbit.quant import QuantConfig, QuantizedTensor

__all__ = ["compare", "run"]

Check = tuple[str, float]
"""What was compared, and how far off it was as a part of what is allowed: beyond 1 is wrong. Equal bits are 0."""


def run(settings: Settings, ledger: Ledger) -> None:
    """Compare, write all of it down, and say what is wrong."""
    found: list[dict[str, Any]] = []
    with torch.no_grad(), dispatch.use(settings.backend):
        for name, worst in compare(settings):
            found.append({"check": name, "worst": worst})
            if not worst <= 1:
                ledger.note(f"WRONG: {name} is off by {worst:.3g} times what is allowed.")
    (Path(settings.folder) / CHECKS).write_text(json.dumps(found, indent=1) + "\n")
    wrong = sum(not one["worst"] <= 1 for one in found)
    print(f"{len(found)} comparisons with the reference, {wrong} wrong", flush=True)


def compare(settings: Settings) -> Iterator[Check]:
    """Every comparison, one after the other; an operation that raises is off without limit."""
    shapes = [(5, 64), (7, 65), (96, 128)] if settings.quick else [(7, 65), (128, 192), (4096, 4096), (1000, 4100)]
    dtypes = [torch.bfloat16] if settings.quick else [torch.bfloat16, torch.float16, torch.float32]
    for shape in shapes:
        for dtype in dtypes:
            for nested in (False, True):
                yield from _one_weight(shape, dtype, nested, settings)


def _one_weight(shape: tuple[int, int], dtype: torch.dtype, nested: bool, settings: Settings) -> Iterator[Check]:
    rows, columns = shape
    generator = torch.Generator(settings.device).manual_seed(rows)
    label = f"{rows}x{columns}, {str(dtype)[6:]}, {'nested' if nested else 'plain'}"
    weight = torch.randn(rows, columns, generator=generator, device=settings.device).to(dtype)
    config = QuantConfig(double_quant=nested)
    with dispatch.use("reference"):
        true = fourbit.quantize(weight, config)
        decoded = true.dequantize(dtype)
    if not nested:
        yield f"quantize {label}", _guarded(lambda: _same(_parts(fourbit.quantize(weight, config)), _parts(true)))
    else:
        yield f"absmax {label}", _guarded(lambda: _same(_parts(fourbit.quantize(weight, config)), _parts(true)))
    yield f"dequantize {label}", _guarded(lambda: _same([true.dequantize(dtype)], [decoded]))
    for tokens in (1, 3) if settings.quick else (1, 2, 5, 16, 33, 64, 300):
        x = torch.randn(tokens, columns, generator=generator, device=settings.device).to(dtype)
        yield from _products(f"{label}, {tokens} tokens", x, true)


def _products(label: str, x: Tensor, w: QuantizedTensor) -> Iterator[Check]:
    wide = w.dequantize(torch.float32).double()
    product = (x, w.packed, w.absmax, w.nested_absmax, w.nested_offset, w.levels, w.block_size, w.shape[0], None)
    yield f"linear {label}", _guarded(lambda: _within(torch.ops.fourbit.linear(*product), x, wide))
    for name, way in variants("linear").items():
        worst = _guarded(lambda way=way: _within(way(*product), x, wide), may_refuse=True)  # type: ignore[misc]
        if worst != REFUSED:
            yield f"linear, variant {name}, {label}", worst
    grad = (x @ wide.t().to(x.dtype)).contiguous()
    back = (grad, *product[1:7], w.shape[1])
    yield (
        f"linear_grad_input {label}",
        _guarded(lambda: _within(torch.ops.fourbit.linear_grad_input(*back), grad, wide.t())),
    )


REFUSED = -1.0
"""Stands for a variant that does not take these arguments."""


def _guarded(work: Callable[[], float], *, may_refuse: bool = False) -> float:
    try:
        return work()
    except Exception as error:
        if may_refuse and isinstance(error, (NotImplementedError, ValueError)):
            return REFUSED
        print(f"{type(error).__name__}: {error}", flush=True)
        return float("inf")


def _parts(q: QuantizedTensor) -> list[Tensor]:
    return [part for part in (q.packed, q.absmax, q.nested_absmax, q.nested_offset) if part is not None]


def _same(found: list[Tensor], true: list[Tensor]) -> float:
    equal = len(found) == len(true) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, true, strict=True)
    )
    return 0.0 if equal else float("inf")


def _within(y: Tensor, x: Tensor, wide: Tensor) -> float:
    """The largest error as a part of the bound; not a number counts as beyond it."""
    u = torch.finfo(x.dtype).eps / 2
    exact = x.double() @ wide.t()
    size = x.double().abs() @ wide.abs().t()
    bound = (2 * u + x.shape[-1] * 2.0**-24) * size + u * exact.abs() + torch.finfo(x.dtype).tiny
    worst = ((y.double() - exact).abs() / bound).max()
    return float(worst) if bool(worst.isfinite()) else float("inf")
