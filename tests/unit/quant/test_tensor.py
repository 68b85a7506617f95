"""QuantizedTensor and quantize: values, sizes, dtypes, devices, and the published error of each format."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

import fourbit
from fourbit.errors import InvalidBlockSize, NonFiniteWeight, UnsupportedDtype
from fourbit.formats import CODEBOOKS, unpack_codes
from fourbit.quant import QuantConfig, QuantizedTensor, quantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(dtype)


def scales(q: QuantizedTensor) -> Tensor:
    """[G] fp32, decoded here from the definition."""
    if q.nested_absmax is None or q.nested_offset is None:
        return q.absmax
    levels = torch.from_numpy(fourbit.formats.dynamic_map())[q.absmax.int()]
    return levels * q.nested_absmax.repeat_interleave(256)[: q.absmax.numel()] + q.nested_offset


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", CODEBOOKS)
def test_values_are_level_times_scale_of_the_own_block(format: str, double_quant: bool) -> None:
    weight = normal(37, 45)
    q = quantize(weight, QuantConfig(format=format, block_size=32, double_quant=double_quant))
    codes = unpack_codes(q.packed.numpy(), elements=weight.numel())
    by_block = scales(q)[torch.arange(weight.numel()) // 32]
    expected = q.levels[torch.from_numpy(codes).int()] * by_block
    for dtype in DTYPES:
        assert torch.equal(q.dequantize(dtype), expected.to(dtype).view(37, 45))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (65,), (3, 5, 7), (0,), (4, 0), (129, 64)])
def test_shapes(shape: tuple[int, ...], double_quant: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize(weight, QuantConfig(double_quant=double_quant))
    elements = weight.numel()
    assert q.shape == weight.shape
    assert q.numel() == elements
    assert q.packed.shape == ((elements + 1) // 2,)
    assert q.absmax.shape == (-(-elements // 64),)
    assert q.dequantize().shape == weight.shape
    held = [q.packed, q.absmax, q.nested_absmax, q.nested_offset]
    assert q.nbytes == sum(part.numel() * part.element_size() for part in held if part is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_it_came_from_is_the_dtype_it_goes_back_to(dtype: torch.dtype) -> None:
    q = quantize(normal(64, 3, dtype=dtype))
    assert q.dtype == q.dequantize().dtype == dtype
    assert q.dequantize(torch.float32).dtype == torch.float32
    assert f"from {str(dtype).removeprefix('torch.')}" in repr(q)


def test_strides_do_not_matter() -> None:
    weight = normal(48, 80)
    assert torch.equal(quantize(weight.t()).packed, quantize(weight.t().contiguous()).packed)
    assert torch.equal(quantize(weight[:, ::2]).packed, quantize(weight[:, ::2].contiguous()).packed)


def test_bits_per_parameter() -> None:
    weight = normal(256, 1024)
    assert quantize(weight, QuantConfig(double_quant=False)).bits_per_parameter == 4.5
    offset = 32 / weight.numel()
    assert quantize(weight).bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + offset)
    assert quantize(torch.zeros(0)).bits_per_parameter == 0


@pytest.mark.parametrize(("format", "published"), [("nf4", 0.00845), ("int4", 0.01158), ("fp4", 0.01487)])
def test_the_error_on_normal_numbers_is_the_published_one(format: str, published: float) -> None:
    """Blocks of 64 are independent, so the mean over B of them has the standard error sd / sqrt(B); five of those, and
    half a unit of the last published digit."""
    weight = normal(1 << 21)
    error = quantize(weight, QuantConfig(format=format, double_quant=False)).dequantize() - weight
    per_block = error.square().view(-1, 64).mean(dim=1)
    standard_error = per_block.std().item() / math.sqrt(per_block.numel())
    assert abs(per_block.mean().item() - published) <= 5 * standard_error + 5e-6


def test_the_formats_rank_by_error_as_published() -> None:
    weight = normal(1 << 18)
    formats = ["nf4", "int4", "fp4", "nf3", "nf2"]
    errors = [(quantize(weight, QuantConfig(format=f)).dequantize() - weight).square().mean().item() for f in formats]
    assert errors == sorted(errors)


def test_an_own_buffer_is_written_in_place() -> None:
    weight = normal(10, 33)
    q, out = quantize(weight), torch.full((10, 33), torch.nan, dtype=torch.bfloat16)
    assert q.dequantize(out=out) is out
    assert torch.equal(out, q.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        (torch.empty(33, 10), r"\[33, 10\]"),
        (torch.empty(33, 10).t(), "strided"),
        (torch.empty(10, 33, dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_a_buffer_that_does_not_fit(out: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        quantize(normal(10, 33)).dequantize(torch.float32, out=out)


def test_parts_that_do_not_fit_together() -> None:
    q = quantize(normal(64, 64), QuantConfig(double_quant=False))
    broken = QuantizedTensor(q.packed, q.absmax[:-1], None, None, q.shape, q.dtype)
    with pytest.raises(
        ValueError, match=r"\[64, 64\] at block size 64 has 2048 packed bytes and 64 scales; 2048 and 63"
    ):
        broken.dequantize()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_quantized(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedDtype, match=f"{dtype} cannot be quantized; give float32, float16, bfloat16"):
        quantize(torch.ones(8).to(dtype))
    with pytest.raises(UnsupportedDtype, match="cannot be decoded"):
        quantize(torch.ones(8)).dequantize(dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 63, 64, 99])
def test_what_is_not_finite_is_refused(value: float, position: int) -> None:
    for dtype in DTYPES:
        weight = torch.ones(100, dtype=dtype)
        weight[position] = value
        with pytest.raises(NonFiniteWeight, match="NaN or infinity"):
            quantize(weight)


def test_a_block_size_that_is_not_allowed_by_the_operation_itself() -> None:
    with pytest.raises(InvalidBlockSize):
        fourbit.kernels.ops.quantize_blocks(torch.ones(8), block_size=16)


def test_two_codebooks_of_one_name_are_two() -> None:
    weight = normal(640)
    first = fourbit.kernels.ops.quantize_blocks(weight, codebook=fourbit.formats.normal_float(5, name="mine"))[0]
    second = fourbit.kernels.ops.quantize_blocks(weight, codebook=fourbit.formats.normal_float(16, name="mine"))[0]
    assert not torch.equal(first, second)
    assert int((first & 0xF).max()) <= 4


def test_to_a_device() -> None:
    q = quantize(normal(10, 10))
    assert q.to("cpu").packed is q.packed
    own = q.to("cpu", copy=True)
    assert own.packed.data_ptr() != q.packed.data_ptr()
    assert torch.equal(own.dequantize(), q.dequantize())
    meta = q.to("meta")
    assert meta.device.type == meta.nested_offset.device.type == "meta"  # type: ignore[union-attr]
    assert meta.dequantize().shape == q.shape


def test_copies() -> None:
    q = quantize(normal(10, 10))
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other.dequantize(), q.dequantize())
        assert other.packed.data_ptr() != q.packed.data_ptr()


def test_quantizing_does_not_follow_gradients() -> None:
    weight = normal(8, 8).requires_grad_()
    assert not quantize(weight).dequantize().requires_grad


def test_on_the_meta_device() -> None:
    q = quantize(torch.empty(100, 100, device="meta"))
    assert q.packed.shape == (5000,)
    assert q.nested_absmax is not None
    assert q.nested_absmax.shape == (1,)
