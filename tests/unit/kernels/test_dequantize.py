"""The contract of `dequantize_blocks`: level times the scale of the element's own block, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourbit.errors import UnsupportedDtype
from fourbit.formats import NF4
from fourbit.kernels import dispatch, ops

LEVELS = torch.from_numpy(NF4.table)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def by_definition(packed: Tensor, absmax: Tensor, elements: int, block_size: int) -> Tensor:
    """fp32, one element after the other."""
    values = []
    for index in range(elements):
        code = int(packed[index // 2]) >> 4 if index % 2 == 0 else int(packed[index // 2]) & 15
        values.append(LEVELS[code] * absmax[index // block_size])
    return torch.stack(values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 43), (2, 5, 32), (5, 172)])
def test_it_is_the_definition(choice: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The last shape is one whose rows do not start at blocks, which bitsandbytes decodes wrongly."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, absmax = ops.quantize_blocks(weight)
    with dispatch.use(choice):
        values = ops.dequantize_blocks(packed, absmax, levels=LEVELS, block_size=64, shape=shape, dtype=dtype)
    assert values.shape == shape
    assert torch.equal(values.view(-1), by_definition(packed, absmax, weight.numel(), 64).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e30])
def test_extreme_scales_round_as_torch_does(choice: str, dtype: torch.dtype, scale: float) -> None:
    packed, absmax = ops.quantize_blocks(torch.randn(128) * scale)
    with dispatch.use(choice):
        values = ops.dequantize_blocks(packed, absmax, levels=LEVELS, block_size=64, shape=(128,), dtype=dtype)
    assert torch.equal(values, by_definition(packed, absmax, 128, 64).to(dtype))


def test_nested_scales_are_decoded_on_the_way(choice: str) -> None:
    packed, plain = ops.quantize_blocks(torch.randn(64, 300))
    codes, nested_absmax, offset = ops.quantize_absmax(plain)
    scales = ops.dequantize_absmax(codes, nested_absmax, offset)
    settings = {"levels": LEVELS, "block_size": 64, "shape": (64, 300), "dtype": torch.bfloat16}
    with dispatch.use(choice):
        nested = ops.dequantize_blocks(packed, codes, nested_absmax=nested_absmax, nested_offset=offset, **settings)
        assert torch.equal(nested, ops.dequantize_blocks(packed, scales, **settings))


def test_into_a_given_buffer(choice: str) -> None:
    packed, absmax = ops.quantize_blocks(torch.randn(4, 96))
    settings = {"levels": LEVELS, "block_size": 64, "shape": (4, 96), "dtype": torch.float16}
    out = torch.full((4, 96), torch.nan, dtype=torch.float16)
    with dispatch.use(choice):
        assert ops.dequantize_blocks(packed, absmax, out=out, **settings) is out
        assert torch.equal(out, ops.dequantize_blocks(packed, absmax, **settings))


@pytest.mark.parametrize(
    "out",
    [torch.empty(96, 4), torch.empty(4, 96, dtype=torch.float16), torch.empty(96, 4).t()],
    ids=["shape", "dtype", "strides"],
)
def test_a_buffer_that_does_not_fit(out: Tensor) -> None:
    packed, absmax = ops.quantize_blocks(torch.randn(4, 96))
    with pytest.raises(ValueError, match=r"must be a contiguous torch\.float32 tensor"):
        ops.dequantize_blocks(packed, absmax, levels=LEVELS, block_size=64, shape=(4, 96), dtype=torch.float32, out=out)


def test_a_dtype_that_it_does_not_give() -> None:
    packed, absmax = ops.quantize_blocks(torch.randn(64))
    with pytest.raises(UnsupportedDtype, match=r"torch\.float64"):
        ops.dequantize_blocks(packed, absmax, levels=LEVELS, block_size=64, shape=(64,), dtype=torch.float64)


def test_opcheck() -> None:
    packed, absmax = ops.quantize_blocks(torch.randn(3, 50))
    arguments = (packed, absmax, None, None, LEVELS, 64, torch.empty(3, 50))
    torch.library.opcheck(torch.ops.fourbit.dequantize_blocks, arguments)
