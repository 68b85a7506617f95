"""Two codes to a byte, block sizes, and what a quantized tensor weighs."""

from __future__ import annotations

import numpy as np
import pytest

from fourbit.errors import InvalidBlockSize
from fourbit.formats import (
    BLOCK_SIZES,
    block_count,
    check_block_size,
    pack_codes,
    packed_size,
    quantized_size_bytes,
    unpack_codes,
)


def test_the_even_element_is_the_high_nibble() -> None:
    assert pack_codes(np.array([0x1, 0xF, 0x0, 0x7], dtype=np.uint8), zero_code=7).tolist() == [0x1F, 0x07]


def test_an_odd_tail_is_filled_with_the_code_of_zero() -> None:
    assert pack_codes(np.array([0xA], dtype=np.uint8), zero_code=7).tolist() == [0xA7]


@pytest.mark.parametrize("elements", [0, 1, 2, 3, 63, 64, 65, 1001])
def test_round_trip(elements: int) -> None:
    codes = np.random.default_rng(elements).integers(0, 16, elements, dtype=np.uint8)
    packed = pack_codes(codes, zero_code=0)
    assert packed.dtype == np.uint8
    assert packed.size == packed_size(elements)
    assert np.array_equal(unpack_codes(packed, elements=elements), codes)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_allowed_block_sizes(block_size: int) -> None:
    assert check_block_size(block_size) == block_size


@pytest.mark.parametrize("block_size", [0, -64, 1, 16, 48, 63, 8192, True])
def test_refused_block_sizes(block_size: int) -> None:
    with pytest.raises(
        InvalidBlockSize, match=f"block size is {block_size}; it must be a power of two from 32 to 4096"
    ):
        check_block_size(block_size)


@pytest.mark.parametrize(("elements", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2), (6400, 100)])
def test_block_count(elements: int, blocks: int) -> None:
    assert block_count(elements, 64) == blocks


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_bits_per_parameter(double_quant: bool, bits: float) -> None:
    """4.5 and 4.127 bits, as the paper counts; the one fp32 offset of a tensor vanishes in a large one."""
    elements = 1 << 24
    size = quantized_size_bytes(elements, block_size=64, double_quant=double_quant)
    assert size - 4 * double_quant == elements * bits / 8


def test_double_quantization_saves_what_the_paper_says() -> None:
    plain, nested = (quantized_size_bytes(1 << 24, block_size=64, double_quant=d) for d in (False, True))
    assert (plain - nested) * 8 / (1 << 24) == pytest.approx(0.373, abs=5e-4)
    parameters = 65.2e9  # of LLaMA-65B, nearly all in linear layers
    assert 0.373 / 8 * parameters == pytest.approx(3.03e9, rel=0.01)
