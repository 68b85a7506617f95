"""The Triton kernels against the reference: equal bits where bits are promised, else the derived bound.

They run in Triton's interpreter where torch sees no GPU, and compiled on the GPU where it sees one.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.errors import NonFiniteWeight
from fourbit.formats import BLOCK_SIZES, CODEBOOKS, Codebook, block_count, packed_size
from fourbit.kernels import reference
from fourbit.kernels.reference.dequantize import decode
from fourbit.kernels.triton import unavailable, variants

if (reason := unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fourbit.kernels.triton import absmax as triton_absmax
from fourbit.kernels.triton import dequantize as triton_dequantize
from fourbit.kernels.triton import linear as triton_linear
from fourbit.kernels.triton import quantize as triton_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

dtypes = st.sampled_from(DTYPES)
codebooks = st.sampled_from(list(CODEBOOKS.values()))
block_sizes = st.sampled_from(BLOCK_SIZES)
seeds = st.integers(0, 2**31)
# around every block size, and across the 4,096 elements that one program takes
sizes = st.one_of(st.integers(0, 300), st.integers(300, 9000), st.sampled_from([4095, 4096, 4097, 8191, 8193, 12345]))
magnitudes = st.sampled_from([0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-7, 1e-3, 1.0, 1e4, 1e30, 3e38])


def drawn(seed: int, size: int, magnitude: float, dtype: torch.dtype) -> Tensor:
    """Normal numbers with some zeros, ties and repeated maxima among them, finite in the dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator)
    x = torch.where(torch.rand(size, generator=generator) < 0.1, x.round(), x)
    info = torch.finfo(dtype)
    return (x * magnitude).to(dtype).nan_to_num(posinf=info.max, neginf=info.min).to(DEVICE)


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal to the bit, the sign of zero included."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def tables(codebook: Codebook) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(codebook.thresholds).to(DEVICE), torch.from_numpy(codebook.ranked_codes).to(DEVICE)


@settings(max_examples=80)
@given(seeds, sizes, magnitudes, dtypes, block_sizes, codebooks)
def test_quantize(
    seed: int, size: int, magnitude: float, dtype: torch.dtype, block_size: int, codebook: Codebook
) -> None:
    weight = drawn(seed, size, magnitude, dtype)
    got = triton_quantize.quantize_blocks(weight, *tables(codebook), block_size)
    for ours, theirs in zip(got, reference.quantize_blocks(weight, *tables(codebook), block_size), strict=True):
        assert_same(ours, theirs)


@settings(max_examples=25)
@given(st.data(), st.integers(1, 9000), dtypes, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_is_not_finite_is_refused(data: st.DataObject, size: int, dtype: torch.dtype, value: float) -> None:
    weight = drawn(0, size, 1.0, dtype)
    weight[data.draw(st.integers(0, size - 1))] = value
    with pytest.raises(NonFiniteWeight):
        triton_quantize.quantize_blocks(weight, *tables(CODEBOOKS["nf4"]), 64)


@settings(max_examples=60)
@given(seeds, st.integers(0, 3000), magnitudes)
def test_absmax(seed: int, size: int, magnitude: float) -> None:
    scales = drawn(seed, size, magnitude, torch.float32).abs()
    offset = scales.mean() if size else scales.new_zeros(())
    if not offset.isfinite():
        offset = scales.new_zeros(())
    codes, nested = triton_absmax.quantize_absmax(scales, offset)
    expected_codes, expected_nested = reference.quantize_absmax(scales, offset)
    assert_same(codes, expected_codes)
    assert_same(nested, expected_nested)
    decoded = triton_absmax.dequantize_absmax(codes, nested, offset)
    assert_same(decoded, reference.dequantize_absmax(codes, nested, offset))


def quantized(seed: int, size: int, block_size: int, magnitude: float, *, nested: bool) -> Parts:
    """Random codes and scales, plain or nested, with which no value is NaN."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (packed_size(size),), dtype=torch.uint8, generator=generator).to(DEVICE)
    scales = (torch.rand(block_count(size, block_size), generator=generator) * magnitude).to(DEVICE)
    if not nested or not size:
        return packed, scales, None, None
    offset = scales.double().mean().float()
    return packed, *reference.quantize_absmax(scales, offset), offset


@settings(max_examples=80)
@given(seeds, sizes, magnitudes, dtypes, block_sizes, codebooks, st.booleans())
def test_dequantize(
    seed: int, size: int, magnitude: float, dtype: torch.dtype, block_size: int, codebook: Codebook, nested: bool
) -> None:
    parts = quantized(seed, size, block_size, magnitude, nested=nested)
    levels = torch.from_numpy(codebook.table).to(DEVICE)
    out = torch.full((size,), torch.nan, dtype=dtype, device=DEVICE)
    triton_dequantize.dequantize_blocks(*parts, levels, block_size, out)
    assert_same(out, decode(*parts, levels, block_size, (size,), dtype))


@settings(max_examples=60)
@given(
    seeds,
    st.integers(1, 80),
    st.sampled_from([1, 2, 3, 16, 17, 64, 65]),
    st.sampled_from([32, 64, 96, 192, 320, 100, 43]),
    dtypes,
    st.sampled_from([32, 64, 128, 4096]),
    codebooks,
    st.booleans(),
    st.booleans(),
)
def test_products(
    seed: int,
    rows: int,
    tokens: int,
    features: int,
    dtype: torch.dtype,
    block_size: int,
    codebook: Codebook,
    nested: bool,
    biased: bool,
) -> None:
    """Within the bound of the contract (`ops.linear`), whichever way the shape takes."""
    parts = quantized(seed, rows * features, block_size, 1.0, nested=nested)
    levels = torch.from_numpy(codebook.table).to(DEVICE)
    x, bias = drawn(seed, tokens * features, 1.0, dtype).view(tokens, features), drawn(seed, rows, 1.0, dtype)
    y = triton_linear.linear(x, *parts, levels, block_size, rows, bias if biased else None)
    assert_within_the_bound(y, x, decode(*parts, levels, block_size, (rows, features), torch.float32), bias * biased)


def assert_within_the_bound(y: Tensor, x: Tensor, w: Tensor, bias: Tensor) -> None:
    """|y - y*| <= (two roundings of a weight + K + 2 of fp32 sums) sum |x||w| + two roundings of the result."""
    unit, small = torch.finfo(x.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    exact = x.double() @ w.double().t() + bias.double()
    sums = x.double().abs() @ w.double().abs().t() + bias.double().abs()
    spacing = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    factor = (0.0 if x.dtype == torch.float32 else 2 * unit) + (w.shape[1] + 2) * small
    bound = factor * sums + 3 * unit * (exact.abs() + bias.double().abs()) + (4 * w.shape[1] + 1) * spacing
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", variants()["linear"])
def test_every_variant_computes_the_product(name: str, dtype: torch.dtype) -> None:
    """Also those that no shape takes by itself; of three tokens, rows that end within a tile, and a bias."""
    parts = quantized(0, 70 * 192, 64, 1.0, nested=True)
    levels = torch.from_numpy(CODEBOOKS["nf4"].table).to(DEVICE)
    x, bias = drawn(1, 2 * 192, 1.0, dtype).view(2, 192), drawn(2, 70, 1.0, dtype)
    if dtype == torch.float32 and ("skinny" in name or "permute" in name):
        with pytest.raises(ValueError, match="fp32"):
            variants()["linear"][name](x, *parts, levels, 64, 70, bias)
        return
    y = variants()["linear"][name](x, *parts, levels, 64, 70, bias)
    assert_within_the_bound(y, x, decode(*parts, levels, 64, (70, 192), torch.float32), bias)


def test_the_same_call_gives_the_same_bits() -> None:
    """Splits of the sum are added in one order, whichever program ends first."""
    parts = quantized(0, 48 * 1024, 64, 1.0, nested=True)
    levels = torch.from_numpy(CODEBOOKS["nf4"].table).to(DEVICE)
    for tokens in (1, 5):
        x = drawn(1, tokens * 1024, 1.0, torch.bfloat16).view(tokens, 1024)
        first, *others = (triton_linear.linear(x, *parts, levels, 64, 48, None) for _ in range(3))
        for other in others:
            assert_same(other, first)


def test_which_way_a_shape_takes() -> None:
    levels = torch.from_numpy(CODEBOOKS["nf4"].table).to(DEVICE)

    def way(tokens: int, features: int, dtype: torch.dtype, block_size: int = 64) -> str:
        weight = (*quantized(0, 8 * features, block_size, 1.0, nested=False), levels, block_size)
        return triton_linear.choose(torch.empty(tokens, features, dtype=dtype, device=DEVICE), weight, 8).name

    assert [way(tokens, 128, torch.float32) for tokens in (1, 8, 9)] == ["matvec", "matvec", "decoded"]
    if triton_linear.capability(torch.device(DEVICE)) >= triton_linear.TENSOR_CORES:
        assert [way(tokens, 128, torch.bfloat16) for tokens in (1, 2, 64, 65)] == [
            "matvec",
            "skinny",
            "skinny",
            "decoded",
        ]
    assert way(1, 128 + 16, torch.bfloat16) == "decoded"  # rows that end within a group
    assert way(0, 128, torch.bfloat16) == "decoded"
    assert way(1, 32, torch.float32, 4096) == "matvec"  # many rows to a block
