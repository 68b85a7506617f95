"""Two 4-bit codes to a byte, and what a quantized tensor weighs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fourbit.errors import InvalidBlockSize

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK_SIZE",
    "block_count",
    "check_block_size",
    "pack_codes",
    "packed_size",
    "quantized_size_bytes",
    "unpack_codes",
]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Elements per scale that are allowed: the set that bitsandbytes reads."""

NESTED_BLOCK_SIZE = 256
"""Scales per second-level scale under double quantization."""


def check_block_size(block_size: int) -> int:
    """Return the block size if it is allowed.

    Raises:
        InvalidBlockSize: not a power of two from 32 to 4096.
    """
    if isinstance(block_size, bool) or block_size not in BLOCK_SIZES:
        raise InvalidBlockSize(
            f"The block size is {block_size}; it must be a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}."
        )
    return block_size


def packed_size(elements: int) -> int:
    """Bytes that hold the codes of n elements: two to a byte, rounded up."""
    return (elements + 1) // 2


def block_count(elements: int, block_size: int) -> int:
    """Blocks, and so scales, of n elements; the last block may be shorter."""
    return -(-elements // block_size)


def quantized_size_bytes(elements: int, *, block_size: int, double_quant: bool) -> int:
    """Bytes of codes and scales of one tensor, without the constant tables (4-bit levels, 8-bit map).

    At block size 64 that is 4.5 bits per element, and 4.127 with double quantization: 4 + 8/64 + 32/(64 * 256).
    """
    blocks = block_count(elements, block_size)
    if not double_quant:
        return packed_size(elements) + 4 * blocks
    return packed_size(elements) + blocks + 4 * block_count(blocks, NESTED_BLOCK_SIZE) + 4


def pack_codes(codes: npt.NDArray[np.uint8], *, zero_code: int) -> npt.NDArray[np.uint8]:
    """Pack codes two to a byte, the even element in the high nibble.

    Args:
        codes: [n] uint8, each 0 to 15.
        zero_code: fills the low nibble of the last byte when n is odd.

    Returns:
        [ceil(n/2)] uint8.
    """
    if codes.size % 2:
        codes = np.append(codes, np.uint8(zero_code))
    return (codes[0::2] << np.uint8(4)) | codes[1::2]


def unpack_codes(packed: npt.NDArray[np.uint8], *, elements: int) -> npt.NDArray[np.uint8]:
    """Undo `pack_codes`: [ceil(n/2)] uint8 to [n] uint8 codes."""
    codes = np.empty(packed.size * 2, dtype=np.uint8)
    codes[0::2] = packed >> 4
    codes[1::2] = packed & 0xF
    return codes[:elements]
