"""Every SIMD level of this CPU against the reference: equal bits where bits are promised, else the derived bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.errors import NonFiniteWeight
from fourbit.formats import BLOCK_SIZES, CODEBOOKS, Codebook, block_count, packed_size
from fourbit.kernels import reference
from fourbit.kernels.native import library, unavailable
from fourbit.kernels.reference.dequantize import decode

if unavailable() is not None:
    pytest.skip(f"the native kernels are {unavailable()}", allow_module_level=True)

from fourbit.kernels.native import absmax as native_absmax
from fourbit.kernels.native import dequantize as native_dequantize
from fourbit.kernels.native import linear as native_linear
from fourbit.kernels.native import quantize as native_quantize

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LANES = {"scalar": 4, "neon": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16}

dtypes = st.sampled_from(DTYPES)
codebooks = st.sampled_from(list(CODEBOOKS.values()))
block_sizes = st.sampled_from(BLOCK_SIZES)
seeds = st.integers(0, 2**31)
# around every vector width and block size, and across the 16,384 and 32,768 elements that one task takes
sizes = st.one_of(st.integers(0, 300), st.integers(300, 9000), st.sampled_from([16384, 16385, 32767, 32769, 40001]))
magnitudes = st.sampled_from([0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-7, 1e-3, 1.0, 1e4, 1e30, 3e38])


@pytest.fixture(scope="module", params=library.levels(), autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = library.level()
    library.set_level(request.param)
    yield request.param
    library.set_level(before)


def drawn(seed: int, size: int, magnitude: float, dtype: torch.dtype) -> Tensor:
    """Normal numbers with some zeros, ties and repeated maxima among them, finite in the dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator)
    x = torch.where(torch.rand(size, generator=generator) < 0.1, x.round(), x)
    return (x * magnitude).to(dtype).nan_to_num(posinf=torch.finfo(dtype).max, neginf=torch.finfo(dtype).min)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal to the bit, the sign of zero included."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def tables(codebook: Codebook) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(codebook.thresholds), torch.from_numpy(codebook.ranked_codes)


@settings(max_examples=150)
@given(seeds, sizes, magnitudes, dtypes, block_sizes, codebooks)
def test_quantize(
    level: str, seed: int, size: int, magnitude: float, dtype: torch.dtype, block_size: int, codebook: Codebook
) -> None:
    weight = drawn(seed, size, magnitude, dtype)
    got = native_quantize.quantize_blocks(weight, *tables(codebook), block_size)
    for ours, theirs in zip(got, reference.quantize_blocks(weight, *tables(codebook), block_size), strict=True):
        assert_same(ours, theirs)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 9000), dtypes, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_is_not_finite_is_refused(
    level: str, data: st.DataObject, size: int, dtype: torch.dtype, value: float
) -> None:
    weight = drawn(0, size, 1.0, dtype)
    weight[data.draw(st.integers(0, size - 1))] = value
    with pytest.raises(NonFiniteWeight):
        native_quantize.quantize_blocks(weight, *tables(CODEBOOKS["nf4"]), 64)


@settings(max_examples=100)
@given(seeds, st.integers(0, 3000), magnitudes)
def test_absmax(level: str, seed: int, size: int, magnitude: float) -> None:
    scales = drawn(seed, size, magnitude, torch.float32).abs()
    offset = scales.mean() if size else torch.zeros(())
    if not offset.isfinite():
        offset = torch.zeros(())
    codes, nested = native_absmax.quantize_absmax(scales, offset)
    expected_codes, expected_nested = reference.quantize_absmax(scales, offset)
    assert_same(codes, expected_codes)
    assert_same(nested, expected_nested)
    decoded = native_absmax.dequantize_absmax(codes, nested, offset)
    assert_same(decoded, reference.dequantize_absmax(codes, nested, offset))


Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def quantized(seed: int, size: int, block_size: int, magnitude: float, *, nested: bool) -> Parts:
    """Random codes and scales, plain or nested, with which no value is NaN."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (packed_size(size),), dtype=torch.uint8, generator=generator)
    scales = torch.rand(block_count(size, block_size), generator=generator) * magnitude
    if not nested or not size:
        return packed, scales, None, None
    offset = scales.double().mean().float()
    return packed, *reference.quantize_absmax(scales, offset), offset


@settings(max_examples=150)
@given(seeds, sizes, magnitudes, dtypes, block_sizes, codebooks, st.booleans())
def test_dequantize(
    level: str,
    seed: int,
    size: int,
    magnitude: float,
    dtype: torch.dtype,
    block_size: int,
    codebook: Codebook,
    nested: bool,
) -> None:
    weight = (*quantized(seed, size, block_size, magnitude, nested=nested), torch.from_numpy(codebook.table))
    out = torch.empty(size, dtype=dtype)
    native_dequantize.dequantize_blocks(*weight, block_size, out)
    assert_same(out, decode(*weight, block_size, (size,), dtype))


@pytest.mark.parametrize("unaligned", [False, True])
def test_dequantize_past_the_caches(level: str, unaligned: bool) -> None:
    """Outputs of 32 MiB and more are written by streaming stores, if they are aligned."""
    size = (32 << 20) // 2 + 77
    weight = (*quantized(0, size, 64, 1.0, nested=True), torch.from_numpy(CODEBOOKS["nf4"].table))
    buffer = torch.zeros(size + 33, dtype=torch.bfloat16)
    out = buffer[1 : size + 1] if unaligned else buffer[32 : size + 32]
    assert (out.data_ptr() % 64 != 0) == unaligned
    native_dequantize.dequantize_blocks(*weight, 64, out)
    assert_same(out, decode(*weight, 64, (size,), torch.bfloat16))
    assert buffer[: out.storage_offset()].any() == buffer[out.storage_offset() + size :].any() == False  # noqa: E712


@settings(max_examples=150)
@given(
    seeds,
    st.integers(1, 70),
    st.one_of(st.integers(1, 300), st.sampled_from([512, 576, 1376, 2049, 4096])),
    st.integers(1, 20),
    dtypes,
    block_sizes,
    codebooks,
    st.booleans(),
    st.booleans(),
)
def test_linear(
    level: str,
    seed: int,
    rows: int,
    cols: int,
    m: int,
    dtype: torch.dtype,
    block_size: int,
    codebook: Codebook,
    nested: bool,
    with_bias: bool,
) -> None:
    """Within the bound of csrc/kernels/linear.cpp; a row of y does not depend on the others or on the threads."""
    weight = (
        *quantized(seed, rows * cols, block_size, 1.0, nested=nested),
        torch.from_numpy(codebook.table),
        block_size,
    )
    terms = cols / (8 * LANES[level]) + 16
    if cols % 64 == 0 and block_size >= 64:
        terms = max(terms, cols / 16 + 8)  # where the levels are scaled before they are summed
    check_product(native_linear.FEW_ROWS, weight, (rows, cols, m), dtype, seed, terms, with_bias=with_bias)


@settings(max_examples=150)
@given(
    seeds,
    st.integers(1, 140),
    st.one_of(st.integers(1, 12), st.sampled_from([16, 18, 43, 64, 128])).map(lambda count: 32 * count),
    st.integers(1, 70),
    dtypes,
    block_sizes,
    codebooks,
    st.booleans(),
    st.booleans(),
)
def test_linear_many(
    level: str,
    seed: int,
    rows: int,
    cols: int,
    m: int,
    dtype: torch.dtype,
    block_size: int,
    codebook: Codebook,
    nested: bool,
    with_bias: bool,
) -> None:
    """Within the bound of csrc/kernels/linear_many.cpp, whose segments have at most 128 elements."""
    weight = (
        *quantized(seed, rows * cols, block_size, 1.0, nested=nested),
        torch.from_numpy(codebook.table),
        block_size,
    )
    segment = min(block_size, 128, cols & -cols)
    terms = segment + cols / segment + 1
    check_product(native_linear.MANY_ROWS, weight, (rows, cols, m), dtype, seed, terms, with_bias=with_bias)


Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int]


def check_product(
    kernel: dict[str, dict[torch.dtype, Any]],
    weight: Weight,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    seed: int,
    terms: float,
    *,
    with_bias: bool,
) -> None:
    """A product of m rows by one of the kernels, against fp64: `terms` roundings of a sum, and one of the levels."""
    rows, cols, m = sizes
    x = drawn(seed, m * cols, 1.0, dtype).view(m, cols)
    bias = drawn(seed + 1, rows, 1.0, dtype) if with_bias else None
    y = fused(kernel, x, weight, rows, bias)

    exact_weight = decode(*weight, (rows, cols), torch.float32).double()
    exact, products = x.double() @ exact_weight.t(), x.double().abs() @ exact_weight.abs().t()
    unit = 2.0**-24
    of_levels = 2.0**-8 if library.level() == "avx512bf16" and dtype == torch.bfloat16 else 0.0
    bound = (of_levels + terms * unit) * products
    if bias is not None:
        exact = exact + bias.double()
        bound = bound + unit * (exact.abs() + bound)
    # the result's own rounding, and what lies below the normal numbers of its type or of vdpbf16ps' sums
    info = torch.finfo(dtype)
    rounding = info.eps / 2 * (exact.abs() + bound) + info.tiny * info.eps + cols * 2.0**-125
    assert ((y.double() - exact).abs() <= bound + rounding).all()

    one = m // 2
    assert_same(fused(kernel, x[one : one + 1], weight, rows, bias)[0], y[one])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_same(fused(kernel, x, weight, rows, bias), y)
    finally:
        torch.set_num_threads(before)


def fused(
    kernel: dict[str, dict[torch.dtype, Any]], x: Tensor, weight: Weight, rows: int, bias: Tensor | None
) -> Tensor:
    """The product straight from 4 bits by the kernel that has this table, however many rows x has."""
    always: Any = 1 << 62 if kernel is native_linear.FEW_ROWS else (0, 1 << 62)
    never = (1 << 62, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native_linear.MANY_ROWS, library.level(), dict.fromkeys(DTYPES, never))
        patch.setitem(kernel, library.level(), dict.fromkeys(DTYPES, always))
        return native_linear.linear(x, *weight, rows, bias)
