"""Contract: a weight to 4-bit codes and one scale per block."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.errors import UnsupportedDtype
from fourbit.formats import NF4, Codebook, block_count, check_block_size, packed_size
from fourbit.kernels import dispatch, reference

__all__ = ["quantize_blocks"]

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_blocks(weight: Tensor, *, codebook: Codebook = NF4, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 4-bit codes with one scale per block.

    Each block of the row-major weight is divided by its largest magnitude and each element takes the nearest level of
    the codebook, the lower one of two equally near:

        absmax[g] = max |w[i]|,  i in block g
        code[i]   = argmin_c |w[i] / absmax[g] - codebook[c]|

    Args:
        weight: any shape, n elements; fp32, fp16 or bf16; finite.
        codebook: the format.
        block_size: elements per scale; a power of two, 32 to 4096.

    Returns:
        packed: [ceil(n/2)] uint8, the even element in the high nibble.
        absmax: [ceil(n/block_size)] fp32, in the unit of `weight`.

    Cost: 4 + 32/block_size bits per element (4.5 at 64).

    Raises:
        UnsupportedDtype, InvalidBlockSize, NonFiniteWeight.

    Source: QLoRA, arXiv:2305.14314, section 3. Rounding follows bitsandbytes on a CPU to the bit: whole blocks are
    multiplied by fp32(1 / max(absmax, 1e-38)), a shorter last block is divided, and its scale is at least 1e-38.
    """
    _check(weight, block_size)
    thresholds, codes = _tables(codebook, weight.device)
    packed, absmax = torch.ops.fourbit.quantize_blocks(weight.detach(), thresholds, codes, block_size)
    return packed, absmax


def _check(weight: Tensor, block_size: int) -> None:
    check_block_size(block_size)
    if weight.dtype not in WEIGHT_DTYPES:
        raise UnsupportedDtype(
            f"A weight of dtype {weight.dtype} cannot be quantized; give float32, float16, bfloat16."
        )


def _fake(weight: Tensor, thresholds: Tensor, codes: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    _check(weight, block_size)
    packed = weight.new_empty(packed_size(weight.numel()), dtype=torch.uint8)
    return packed, weight.new_empty(block_count(weight.numel(), block_size), dtype=torch.float32)


_tables_by_device: dict[tuple[Codebook, torch.device], tuple[Tensor, Tensor]] = {}


def _tables(codebook: Codebook, device: torch.device) -> tuple[Tensor, Tensor]:
    """Thresholds [15] fp32 and codes by rank [16] uint8 on a device."""
    key = (codebook, device)  # not its name, which two derived NormalFloats may share
    if key not in _tables_by_device:
        with dispatch.kept_for_all():
            thresholds, codes = torch.from_numpy(codebook.thresholds), torch.from_numpy(codebook.ranked_codes)
            _tables_by_device[key] = thresholds.to(device), codes.to(device)
    return _tables_by_device[key]


dispatch.define(
    "quantize_blocks(Tensor weight, Tensor thresholds, Tensor codes, int block_size) -> (Tensor, Tensor)",
    stem="quantize",
    reference=reference.quantize_blocks,
    fake=_fake,
)
