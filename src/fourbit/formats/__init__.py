"""What a 4-bit number is: codebooks, packing, the 8-bit map of the scales. numpy only."""

from fourbit.formats.codebooks import CODEBOOKS, FP4, INT4, NF2, NF3, NF4, Codebook, codebook, normal_float
from fourbit.formats.dynamic8 import STATE_BLOCK_SIZE, dynamic_bins, dynamic_map, nearest_tables
from fourbit.formats.packing import (
    BLOCK_SIZES,
    NESTED_BLOCK_SIZE,
    block_count,
    check_block_size,
    pack_codes,
    packed_size,
    quantized_size_bytes,
    unpack_codes,
)

__all__ = [
    "BLOCK_SIZES",
    "CODEBOOKS",
    "FP4",
    "INT4",
    "NESTED_BLOCK_SIZE",
    "NF2",
    "NF3",
    "NF4",
    "STATE_BLOCK_SIZE",
    "Codebook",
    "block_count",
    "check_block_size",
    "codebook",
    "dynamic_bins",
    "dynamic_map",
    "nearest_tables",
    "normal_float",
    "pack_codes",
    "packed_size",
    "quantized_size_bytes",
    "unpack_codes",
]
