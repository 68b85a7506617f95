"""The same bits as bitsandbytes 0.50.2 on a CPU, on more than a thousand tensors, for every backend and level.

Codes, packed bytes, scales and double-quantized scales are compared with bitsandbytes; decoded values with the
definition, as bitsandbytes' own CPU decode takes another block's scale for some shapes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fourbit.errors import BrokenCheckpoint
from fourbit.formats import BLOCK_SIZES, dynamic_map
from fourbit.kernels import dispatch
from fourbit.kernels.native import library, unavailable
from fourbit.quant import QuantConfig, QuantizedTensor, quantize

functional = pytest.importorskip("bitsandbytes.functional")

BACKENDS = ["reference", *(library.levels() if unavailable() is None else ())]
RANDOM_TENSORS = 1200
SIZES = [1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 100, 127, 129, 255, 256, 257, 1000, 4095, 4097]
LARGE = [(1_000_003,), (1024, 1376), (2047, 513), (3, 5, 7, 11, 30)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """One weight and the way to quantize it."""

    name: str
    weight: Tensor
    config: QuantConfig


def _ties(x: Tensor, levels: Tensor) -> Tensor:
    """Values halfway between two neighbouring levels of a block whose largest is 1."""
    ascending = levels.sort().values.unique()
    middles = (ascending[1:] + ascending[:-1]) / 2
    y = middles[torch.arange(x.numel()) % len(middles)].view(x.shape).clone()
    y.view(-1)[::32] = 1.0
    return y


def _outlier(x: Tensor) -> Tensor:
    y = x.clone()
    y.view(-1)[x.numel() // 2] = 1e4
    return y


NF4_LEVELS = torch.tensor(QuantConfig().codebook.levels)
FP4_LEVELS = torch.tensor(QuantConfig(format="fp4").codebook.levels)

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "small": lambda x: x * 1e-3,
    "large": lambda x: x * 1e3,
    "uniform": lambda x: torch.special.ndtr(x) * 2 - 1,
    "all zero": torch.zeros_like,
    "negative zero": lambda x: -torch.zeros_like(x),
    "one value": lambda x: torch.full_like(x, 0.37),
    "one negative value": lambda x: torch.full_like(x, -1.5),
    "positive": torch.abs,
    "negative": lambda x: -x.abs(),
    "mostly zero": lambda x: x * (x > 2),
    "one outlier": _outlier,
    "integers": lambda x: (x * 3).round(),
    "ties of nf4": lambda x: _ties(x, NF4_LEVELS),
    "ties of fp4": lambda x: _ties(x, FP4_LEVELS),
    # below the normal range of fp32 and bf16; fp16 has its own below 6e-5
    "subnormal": lambda x: x * 1e-39,
    "nearly zero": lambda x: x * 1e-44,
    "subnormal in fp16": lambda x: x * 1e-7,
    "around the smallest scale": lambda x: x * 1e-38,
    "huge": lambda x: (torch.special.ndtr(x) * 2 - 1) * 3.3e38,
    "huge in fp16": lambda x: (torch.special.ndtr(x) * 2 - 1) * 65504,
}


@cache
def cases() -> tuple[Case, ...]:
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    made = []
    for number in range(RANDOM_TENSORS):
        size = draw.choice(SIZES)
        shape: tuple[int, ...] = draw.choice([(size,), (size, 3), (5, size), (size, 1), (1, size)])
        shape = LARGE[number] if number < len(LARGE) else shape
        dtype, kind = draw.choice(DTYPES), draw.choice(list(KINDS))
        weight = KINDS[kind](torch.randn(shape, generator=generator)).to(dtype)
        if not bool(weight.isfinite().all()):  # what is huge in fp32 is infinite in fp16
            kind, weight = "normal", torch.randn(shape, generator=generator).to(dtype)
        config = QuantConfig(
            format=draw.choice(["nf4", "fp4"]),
            block_size=draw.choice(BLOCK_SIZES),
            double_quant=draw.random() < 0.5,
        )
        made.append(Case(f"{number}: {kind} {list(shape)} {dtype} {config}", weight, config))
    return tuple(made)


@cache
def theirs() -> tuple[dict[str, Tensor], ...]:
    """What bitsandbytes writes into a file for each case, under the name w."""
    written = []
    for case in cases():
        packed, state = functional.quantize_4bit(
            case.weight,
            blocksize=case.config.block_size,
            quant_type=case.config.format,
            compress_statistics=case.config.double_quant,
        )
        written.append({"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}})
    return tuple(written)


@contextmanager
def running(backend: str) -> Iterator[None]:
    """The reference, or the native kernels at a level."""
    if backend == "reference":
        with dispatch.use("reference"):
            yield
        return
    before = library.level()
    library.set_level(backend)
    try:
        for operation in ("quantize_blocks", "dequantize_blocks"):
            assert dispatch.explain()[operation]["backend"] == "native"
        yield
    finally:
        library.set_level(before)


def is_infinite_there(written: dict[str, Tensor]) -> bool:
    """Whether the sum of the scales is beyond fp32, so that bitsandbytes has stored an infinite offset."""
    (state,) = [value for key, value in written.items() if ".quant_state." in key]
    return b"Infinity" in bytes(state.numpy())


def defined_values(q: QuantizedTensor) -> npt.NDArray[np.float32]:
    """level * scale of the element's own block, in numpy fp32."""
    elements = q.numel()
    packed, absmax = q.packed.numpy(), q.absmax.numpy()
    codes = np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)[:elements]
    if q.nested_absmax is None or q.nested_offset is None:
        scales = absmax
    else:
        nested = q.nested_absmax.numpy()[np.arange(len(absmax)) // 256]
        scales = dynamic_map()[absmax] * nested + q.nested_offset.numpy()
    levels = np.array(q.config.codebook.levels, dtype=np.float32)
    values: npt.NDArray[np.float32] = levels[codes] * scales[np.arange(elements) // q.block_size]
    return values


def bits(tensor: Tensor) -> Tensor:
    """So that -0.0 and 0.0 are two values."""
    return tensor.view({2: torch.int16, 4: torch.int32}.get(tensor.element_size(), tensor.dtype))


def test_the_cases_are_what_they_should_be() -> None:
    assert len(cases()) >= 1000
    seen: Counter[Any] = Counter()
    for case in cases():
        kind = case.name.partition(": ")[2].partition(" [")[0]
        seen.update([kind, case.weight.dtype, case.config.block_size, case.config.format, case.config.double_quant])
        seen.update([f"{case.weight.dim()}-D", "odd" if case.weight.numel() % 2 else "even"])
        seen["large"] += case.weight.numel() > 1_000_000
        seen["tiny"] += case.weight.numel() < 32
        seen["tail"] += case.weight.numel() % case.config.block_size > 0
    wanted = [*KINDS, *DTYPES, *BLOCK_SIZES, "nf4", "fp4", True, False, "1-D", "2-D", "odd", "even", "tiny", "tail"]
    assert [what for what in wanted if seen[what] < 10] == []
    assert seen["large"] >= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_and_scales_are_bitsandbytes(backend: str) -> None:
    """Every byte that stands in a checkpoint, the JSON part included."""
    different = []
    with running(backend):
        for case, expected in zip(cases(), theirs(), strict=True):
            if is_infinite_there(expected):
                continue
            ours = quantize(case.weight, case.config).state_dict("w")
            keys = [key for key in expected if key not in ours or not torch.equal(bits(ours[key]), bits(expected[key]))]
            if keys or ours.keys() != expected.keys():
                different.append((case.name, keys))
    assert different == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_the_definition(backend: str) -> None:
    different = []
    with running(backend):
        for case in cases():
            q = quantize(case.weight, case.config)
            values = torch.from_numpy(defined_values(q)).view(q.shape)
            for dtype in DTYPES:
                if not torch.equal(bits(q.dequantize(dtype)), bits(values.to(dtype))):
                    different.append((case.name, dtype))
    assert different == []


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("format", ["int4", "nf3", "nf2"])
def test_formats_of_our_own_are_the_reference(backend: str, format: str) -> None:
    different = []
    for case in cases()[::4]:
        config = QuantConfig(format=format, block_size=case.config.block_size, double_quant=case.config.double_quant)
        with running("reference"):
            expected = quantize(case.weight, config)
        with running(backend):
            ours = quantize(case.weight, config)
        same_codes = torch.equal(ours.packed, expected.packed) and torch.equal(bits(ours.absmax), bits(expected.absmax))
        if not same_codes or ours.dequantize().ne(expected.dequantize()).any():
            different.append(case.name)
    assert different == []


def test_their_tensors_load_here() -> None:
    for case, written in zip(cases(), theirs(), strict=True):
        if is_infinite_there(written):
            with pytest.raises(BrokenCheckpoint, match="Infinity"):
                QuantizedTensor.from_state_dict(written, "w")
            continue
        read, ours = QuantizedTensor.from_state_dict(written, "w"), quantize(case.weight, case.config)
        assert read.shape == case.weight.shape, case.name
        assert read.dtype == case.weight.dtype, case.name
        assert read.config == case.config, case.name
        assert torch.equal(bits(read.dequantize()), bits(ours.dequantize())), case.name


def test_our_tensors_load_there() -> None:
    """Their decode is right where rows are whole blocks; there it must give our values."""
    compared = 0
    for case in cases():
        q = quantize(case.weight, case.config)
        tensors = q.state_dict("w")
        state = functional.QuantState.from_dict(
            {key.removeprefix("w."): value for key, value in tensors.items() if key != "w"}, device=torch.device("cpu")
        )
        assert state.shape == case.weight.shape, case.name
        assert (state.blocksize, state.quant_type, state.dtype) == (q.block_size, q.format, q.dtype), case.name
        assert state.nested == case.config.double_quant, case.name
        assert torch.equal(state.absmax, q.absmax), case.name
        if state.nested:
            assert torch.equal(state.state2.absmax, q.nested_absmax), case.name  # type: ignore[arg-type]
            assert torch.equal(state.offset, q.nested_offset), case.name
        if case.weight.shape[-1] % q.block_size == 0:
            compared += 1
            decoded = functional.dequantize_4bit(tensors["w"], state).reshape(q.shape)  # 1-D comes back as a row
            values = q.dequantize()
            # their conversion to bf16 takes numbers below the normal range for zero
            flushed = (decoded == 0) & (values.abs() <= torch.finfo(values.dtype).smallest_normal)
            assert torch.equal(decoded[~flushed], values[~flushed]), case.name
    assert compared >= 10


def test_scales_whose_sum_overflows() -> None:
    """There is no right answer to compare with, so ours must be finite and as near as double quantization gets."""
    overflowing = [case for case, written in zip(cases(), theirs(), strict=True) if is_infinite_there(written)]
    assert 1 <= len(overflowing) <= len(cases()) // 20
    for case in overflowing:
        q = quantize(case.weight, case.config)
        plain = quantize(case.weight, QuantConfig(format=q.format, block_size=q.block_size, double_quant=False))
        # the 8-bit map is nowhere coarser than 1/64 of its largest value, which is at most twice the largest scale
        assert q.nested_absmax is not None
        error = (q.dequantize(torch.float32).double() - plain.dequantize(torch.float32).double()).abs().max()
        assert error <= q.nested_absmax.double().max() / 64 + plain.absmax.double().max() * 1e-6, case.name


@pytest.mark.parametrize("elements", [0, 1])
def test_nearly_nothing(elements: int) -> None:
    for double_quant in (False, True):
        q = quantize(torch.ones(elements), QuantConfig(double_quant=double_quant))
        assert torch.equal(q.dequantize(), torch.ones(elements))
        assert torch.equal(QuantizedTensor.from_state_dict(q.state_dict()).dequantize(), q.dequantize())
