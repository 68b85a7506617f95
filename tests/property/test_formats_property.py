"""What holds for every codebook and every run of codes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fourbit.formats import (
    BLOCK_SIZES,
    CODEBOOKS,
    Codebook,
    block_count,
    dynamic_bins,
    dynamic_map,
    normal_float,
    pack_codes,
    packed_size,
    quantized_size_bytes,
    unpack_codes,
)
from fourbit.formats.dynamic8 import BINS

CODEBOOK = st.sampled_from([*CODEBOOKS.values(), *(normal_float(k) for k in range(3, 17))])
UNIT = st.floats(-1, 1, width=32)


@st.composite
def codebooks(draw: st.DrawFn) -> Codebook:
    """Any codebook at all: 2 to 16 levels, in any order of codes, equal levels allowed."""
    levels = draw(st.lists(UNIT, min_size=2, max_size=16))
    levels = draw(st.permutations(levels))
    return Codebook("drawn", tuple(levels))


def code_of(book: Codebook, value: np.float32) -> int:
    """By the contract: the rank of a value is the number of thresholds strictly below it."""
    return int(book.ranked_codes[int((book.thresholds < value).sum())])


@given(arrays.arrays(np.uint8, st.integers(0, 300), elements=st.integers(0, 15)), st.integers(0, 15))
def test_packing_is_undone_by_unpacking(codes: np.ndarray, zero_code: int) -> None:
    packed = pack_codes(codes, zero_code=zero_code)
    assert packed.size == packed_size(codes.size)
    assert np.array_equal(unpack_codes(packed, elements=codes.size), codes)
    if codes.size % 2:
        assert packed[-1] & 15 == zero_code


@given(codebooks() | CODEBOOK, UNIT)
def test_a_value_takes_a_nearest_level(book: Codebook, value: float) -> None:
    given_ = np.float32(value)
    level = np.float64(book.table[code_of(book, given_)])
    distances = [abs(np.float64(np.float32(other)) - np.float64(given_)) for other in book.levels]
    # a threshold is a midpoint rounded to fp32, so a value within that rounding of it may take the other side
    assert abs(level - np.float64(given_)) <= min(distances) + 2**-24


@given(codebooks() | CODEBOOK, UNIT, UNIT)
def test_codes_keep_the_order(book: Codebook, a: float, b: float) -> None:
    low, high = sorted((np.float32(a), np.float32(b)))
    assert book.table[code_of(book, low)] <= book.table[code_of(book, high)]


@given(CODEBOOK)
def test_a_level_takes_its_own_code(book: Codebook) -> None:
    for level in book.levels:
        assert book.table[code_of(book, np.float32(level))] == np.float32(level)


@given(UNIT)
def test_a_bin_of_the_8_bit_map_is_near_its_value(value: float) -> None:
    """Going through 65,536 bins moves a value by at most half a bin before the nearest level is taken."""
    v = np.float32(value)
    level = dynamic_map()[
        dynamic_bins()[int((v + np.float32(1)) * np.float32(0.5) * np.float32(BINS - 1) + np.float32(0.5))]
    ]
    nearest = np.abs(dynamic_map().astype(np.float64) - v).min()
    assert abs(np.float64(level) - v) <= nearest + 2 * (0.5 * 2 / (BINS - 1)) + 4 * 2**-24


@given(st.integers(0, 10**12), st.sampled_from(BLOCK_SIZES))
def test_sizes(elements: int, block_size: int) -> None:
    blocks = block_count(elements, block_size)
    assert (blocks - 1) * block_size < elements <= blocks * block_size
    plain = quantized_size_bytes(elements, block_size=block_size, double_quant=False)
    nested = quantized_size_bytes(elements, block_size=block_size, double_quant=True)
    assert plain == packed_size(elements) + 4 * blocks
    # what double quantization costs: an offset, and a scale for each 256 scales begun
    assert nested <= plain - 3 * blocks + 4 + 4 * (blocks // 256 + 1)
