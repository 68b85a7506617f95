"""The native kernels where Python cannot call them: NEON under an emulator, and every x86 level under sanitizers.

csrc/tests/replay.cpp is linked with the kernels into a program of its own, calls are written to it, and what it leaves
in the buffers is compared with the reference. With the address sanitizer every buffer has exactly its size, so that a
vector which reads one element too many ends the program.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.formats import FP4, INT4, NF4, block_count, dynamic_bins, dynamic_map, packed_size
from fourbit.kernels import reference
from fourbit.kernels.native import unavailable
from fourbit.kernels.native.library import DTYPES, levels
from fourbit.kernels.native.weight import Weight
from fourbit.kernels.reference.dequantize import decode

SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257, 999, 4096, 4097)
MAGNITUDES = (0.0, 1e-42, 1e-30, 1e-7, 1.0, 1e4, 1e30)
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TARGETS = ["neon", *(f"sanitized {name}" for name in (levels() if unavailable() is None else ()))]


@dataclass(frozen=True)
class Record:
    """A C struct, or an array of them, to be passed by address.

    Attributes:
        layout: of ctypes.
        fields: by name, those of a struct within as "weight.packed", of an array as "0.weight": numbers, and for
            pointers tensors, records or None.
    """

    layout: type[ctypes.Structure] | type[ctypes.Array[Any]]
    fields: dict[str, Any]

    def place(self, name: str) -> tuple[int, Any]:
        """Where a field lies, in bytes, and of what type it is."""
        start, layout = 0, self.layout
        for part in name.split("."):
            if issubclass(layout, ctypes.Array):
                layout, start = layout._type_, start + int(part) * ctypes.sizeof(layout._type_)
            else:
                start += getattr(layout, part).offset
                layout = dict(layout._fields_)[part]
        return start, layout


@dataclass(frozen=True)
class Check:
    """A call, and what must hold of its buffers, which the call changes in place, afterwards."""

    kernel: str
    arguments: tuple[Any, ...]
    verify: Callable[[], None]


def encode(argument: Any, buffers: list[Tensor | None]) -> bytes:
    """See replay.cpp. The tensors whose bytes come back are appended to `buffers`."""
    if argument is None:
        return struct.pack("<q", -1)
    if isinstance(argument, float):
        return struct.pack("<d", argument)
    if isinstance(argument, int):
        return struct.pack("<q", argument)
    if isinstance(argument, Tensor):
        buffers.append(argument)
        return struct.pack("<q", argument.nbytes) + bytes(raw(argument).numpy()) + struct.pack("<q", 0)
    buffers.append(None)
    record, links = bytearray(ctypes.sizeof(argument.layout)), []
    for name, value in argument.fields.items():
        start, kind = argument.place(name)
        if isinstance(value, (Tensor, Record)):
            links.append(struct.pack("<q", start) + encode(value, buffers))
        elif value is not None:
            record[start : start + ctypes.sizeof(kind)] = bytes(kind(value))
    return struct.pack("<q", len(record)) + bytes(record) + struct.pack("<q", len(links)) + b"".join(links)


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8)


class Replay:
    """The program, and how to run it."""

    def __init__(self, command: list[str], level: str) -> None:
        self.command = command
        self.environment = os.environ | {"FOURBIT_CPU": level, "OMP_NUM_THREADS": "2"}

    def __call__(self, checks: list[Check]) -> None:
        """Make all calls in one run, then verify each."""
        buffers: list[list[Tensor | None]] = [[] for _ in checks]
        calls = struct.pack("<q", len(checks))
        for check, changed in zip(checks, buffers, strict=True):
            calls += struct.pack("<q", len(check.kernel)) + check.kernel.encode()
            calls += b"".join(encode(argument, changed) for argument in check.arguments)
        done = subprocess.run(self.command, input=calls, capture_output=True, env=self.environment, check=False)
        assert done.returncode == 0, done.stderr.decode()
        results = memoryview(bytearray(done.stdout))
        for check, changed in zip(checks, buffers, strict=True):
            status, results = results[:8], results[8:]
            assert struct.unpack("<q", status) == (0,), f"{check.kernel} returned {struct.unpack('<q', status)}"
            for tensor in changed:
                size = struct.unpack("<q", results[:8])[0]
                if tensor is not None and size:
                    raw(tensor).copy_(torch.frombuffer(results[8 : 8 + size], dtype=torch.uint8))
                results = results[8 + size :]
            check.verify()
        assert not results


def build(repository: Path, target: str) -> Path:
    """The program for NEON or for this machine with sanitizers, compiled where something changed."""
    spec = importlib.util.spec_from_file_location("setup", repository / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    folder = repository / "build" / "replay" / target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if target == "neon":
                tools = setup.Toolchain(folder, compiler="aarch64-linux-gnu-g++", machine="aarch64")
                flags = ["-static"]
            else:
                tools = setup.Toolchain(folder, flags=SANITIZERS)
                flags = []
            objects = [*tools.compile_all(), tools.compile(repository / "csrc" / "tests" / "replay.cpp", "replay")]
            tools.link(objects, folder / "replay", flags)
        except setup.CannotBuild as error:
            if "no C++ compiler" in str(error):
                pytest.skip(str(error))
            raise
    return folder / "replay"


@pytest.fixture(scope="module", params=TARGETS)
def replay(request: pytest.FixtureRequest, repository: Path) -> Replay:
    target, _, level = request.param.partition(" ")
    if target == "neon":
        native = platform.machine() in ("aarch64", "arm64")
        emulator = [] if native else [shutil.which("qemu-aarch64")]
        if not native and not (emulator[0] and shutil.which("aarch64-linux-gnu-g++")):
            pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
        return Replay([*map(str, emulator), str(build(repository, target))], "neon")
    return Replay([str(build(repository, target))], level)


def test_quantize(replay: Replay) -> None:
    replay(list(quantize_checks(torch.Generator().manual_seed(1))))


def quantize_checks(generator: torch.Generator) -> Iterator[Check]:
    for turn, size in enumerate(SIZES * 3):
        book, dtype = (NF4, FP4, INT4)[turn % 3], list(DTYPES)[turn // len(SIZES)]
        for block_size, magnitude in ((32, 1.0), (64, MAGNITUDES[turn % len(MAGNITUDES)]), (4096, 1.0)):
            weight = (torch.randn(size, generator=generator) * magnitude).to(dtype)
            weight = weight.nan_to_num(posinf=6e4, neginf=-6e4)  # fp16 holds no 1e30
            thresholds, codes = torch.from_numpy(book.thresholds), torch.from_numpy(book.ranked_codes)
            packed = torch.empty(packed_size(size), dtype=torch.uint8)
            absmax = torch.empty(block_count(size, block_size))
            expected = reference.quantize_blocks(weight, thresholds, codes, block_size)
            yield Check(
                "quantize",
                (weight, DTYPES[dtype], size, block_size, thresholds, codes, packed, absmax, 2),
                same((packed, absmax), expected, f"{book.name} {dtype} {size} / {block_size} x {magnitude}"),
            )


def test_absmax(replay: Replay) -> None:
    replay(list(absmax_checks(torch.Generator().manual_seed(2))))


def absmax_checks(generator: torch.Generator) -> Iterator[Check]:
    bins, levels_by_code = torch.from_numpy(dynamic_bins()), torch.from_numpy(dynamic_map())
    for size in SIZES:
        for magnitude in MAGNITUDES:
            absmax = torch.rand(size, generator=generator) * magnitude
            offset = absmax.mean() if size else torch.zeros(())
            codes, nested = torch.empty(size, dtype=torch.uint8), torch.empty(block_count(size, 256))
            expected = reference.quantize_absmax(absmax, offset)
            what = f"{size} x {magnitude}"
            arguments: tuple[Any, ...] = (absmax, size, offset, bins, codes, nested, 2)
            yield Check("quantize_absmax", arguments, same((codes, nested), expected, what))
            decoded = torch.empty(size)
            arguments = (expected[0], size, expected[1], offset, levels_by_code, decoded, 2)
            yield Check(
                "dequantize_absmax",
                arguments,
                same((decoded,), (reference.dequantize_absmax(*expected, offset),), what),
            )


def random_weight(
    generator: torch.Generator, elements: int, block_size: int, *, nested: bool, magnitude: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Packed codes, and plain or nested scales."""
    packed = torch.randint(256, (packed_size(elements),), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(block_count(elements, block_size), generator=generator) * magnitude
    if not nested:
        return packed, absmax, None, None
    offset = absmax.mean()
    return packed, *reference.quantize_absmax(absmax, offset), offset


def record(parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None], levels: Tensor, **sizes: int) -> Record:
    packed, absmax, nested_absmax, nested_offset = parts
    nested = nested_absmax is not None
    scales = {
        "absmax": None if nested else absmax,
        "absmax_codes": absmax if nested else None,
        "nested_absmax": nested_absmax,
        "nested_offset": nested_offset,
        "nested_map": torch.from_numpy(dynamic_map()) if nested else None,
    }
    return Record(Weight, {"packed": packed, **scales, "levels": levels, **sizes})


def test_dequantize(replay: Replay) -> None:
    replay(list(dequantize_checks(torch.Generator().manual_seed(3))))


def dequantize_checks(generator: torch.Generator) -> Iterator[Check]:
    for turn, size in enumerate(SIZES[1:] * 3):
        dtype, block_size = list(DTYPES)[turn // len(SIZES[1:])], (32, 64, 128, 4096)[turn % 4]
        for nested, magnitude in ((False, MAGNITUDES[turn % len(MAGNITUDES)]), (True, 1.0)):
            levels = torch.from_numpy((NF4, FP4, INT4)[turn % 3].table)
            parts = random_weight(generator, size, block_size, nested=nested, magnitude=magnitude)
            expected = decode(*parts, levels, block_size, (size,), dtype)
            # a part from a block's start on, as long as it comes
            first = size // block_size // 2 * block_size
            out = torch.empty(size - first, dtype=dtype)
            weight = record(parts, levels, rows=1, cols=size, block_size=block_size)
            yield Check(
                "dequantize",
                (weight, first, size - first, out, DTYPES[dtype], 2),
                same((out,), (expected[first:].contiguous(),), f"{dtype} {size} / {block_size} x {magnitude}"),
            )


def test_linear(replay: Replay) -> None:
    replay(list(linear_checks(torch.Generator().manual_seed(4))))


def linear_checks(generator: torch.Generator) -> Iterator[Check]:
    shapes = (
        (1, 1),
        (3, 5),
        (7, 4),
        (5, 172),
        (8, 64),
        (33, 127),
        (2, 8),
        (9, 1000),
        (6, 1376),
        (65, 256),
        (37, 96),
        (18, 704),
        (150, 256),  # several strips of scales
    )
    for turn, (rows, cols) in enumerate(shapes * 3):
        dtype, block_size = list(DTYPES)[turn // len(shapes)], (32, 64, 256)[turn % 3]
        for m in (1, 2, 9):
            levels = torch.from_numpy((NF4, FP4, INT4)[turn % 3].table)
            parts = random_weight(generator, rows * cols, block_size, nested=m == 2)
            x = torch.randn(m, cols, generator=generator).to(dtype)
            bias = torch.randn(rows, generator=generator).to(dtype) if turn % 2 else None
            y = torch.empty(m, rows, dtype=dtype)
            weight = record(parts, levels, rows=rows, cols=cols, block_size=block_size)
            exact = decode(*parts, levels, block_size, (rows, cols), torch.float32).double()
            yield Check("linear", (weight, x, DTYPES[dtype], m, bias, y, 2), near(y, x, exact, bias))
            if cols % 32 == 0:
                y = torch.empty(m, rows, dtype=dtype)
                yield Check("linear_many", (weight, x, DTYPES[dtype], m, bias, y, 2), near(y, x, exact, bias))


def near(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], None]:
    """The larger bound of linear.cpp and linear_many.cpp, over all levels and block sizes."""

    def verify() -> None:
        unit = 2.0**-24
        products = x.double().abs() @ weight.abs().t()
        exact = x.double() @ weight.t()
        of_levels = 2.0**-8 if x.dtype == torch.bfloat16 else 0.0
        bound = (of_levels + (x.shape[1] / 16 + 130) * unit) * products
        if bias is not None:
            exact = exact + bias.double()
            bound = bound + unit * (exact.abs() + bound)
        rounding = torch.finfo(y.dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(y.dtype).tiny
        assert ((y.double() - exact).abs() <= bound + rounding).all(), (list(x.shape), x.dtype)

    return verify


def test_lora(replay: Replay) -> None:
    replay(list(lora_checks(torch.Generator().manual_seed(5))))


def lora_checks(generator: torch.Generator) -> Iterator[Check]:
    shapes = ((1, 1, 1, 1), (2, 5, 3, 7), (3, 64, 16, 33), (9, 96, 8, 64), (1, 577, 5, 130))
    for dtype in DTYPES:
        for adapter_dtype in DTYPES:
            for m, cols, rank, rows in shapes:
                x = torch.randn(m, cols, generator=generator).to(dtype)
                a = torch.randn(rank, cols, generator=generator).to(adapter_dtype)
                b = torch.randn(rows, rank, generator=generator).to(adapter_dtype)
                y = torch.randn(m, rows, generator=generator).to(dtype)
                xa = torch.empty(m, rank, dtype=dtype)
                arguments = (x, DTYPES[dtype], m, cols, a, b, DTYPES[adapter_dtype], rank, rows, 0.5, xa, y, 2)
                yield Check("lora_add", arguments, added(y.clone(), y, xa, x, a, b))


def added(before: Tensor, y: Tensor, xa: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Callable[[], None]:
    """The bound of lora.cpp, with the fewest lanes of any level (4), for a scaling of a half."""

    def verify() -> None:
        unit, half = 2.0**-24, torch.finfo(x.dtype).eps / 2
        wide_a, wide_b = a.to(x.dtype).double(), b.to(x.dtype).double()
        exact = x.double() @ wide_a.t()
        error = (x.shape[1] / 4 + 6) * unit * (x.double().abs() @ wide_a.abs().t()) + half * exact.abs()
        assert ((xa.double() - exact).abs() <= error * (1 + half) + torch.finfo(x.dtype).tiny).all()
        share = 0.5 * (xa.double() @ wide_b.t())
        error = (a.shape[0] / 4 + 8) * unit * (0.5 * xa.double().abs() @ wide_b.abs().t() + before.double().abs())
        exact = before.double() + share
        assert ((y.double() - exact).abs() <= error + half * (exact.abs() + error) + torch.finfo(x.dtype).tiny).all()

    return verify


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> Callable[[], None]:
    def verify() -> None:
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(raw(ours), raw(theirs)), what

    return verify


def test_a_step_beyond_a_buffer_is_seen(repository: Path) -> None:
    """The sanitizer is at work: a call that says more elements than there are must end the program."""
    if unavailable() is not None:
        pytest.skip("needs the native kernels")
    run = Replay([str(build(repository, "sanitized"))], "scalar")
    absmax, codes = torch.ones(256), torch.empty(256, dtype=torch.uint8)
    bins = torch.from_numpy(dynamic_bins())
    call = Check("quantize_absmax", (absmax, 257, torch.zeros(()), bins, codes, torch.empty(2), 1), lambda: None)
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run([call])
