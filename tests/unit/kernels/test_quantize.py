"""The contract of `quantize_blocks`: what it computes, and what it refuses. Bits against the peer: tests/parity."""

from __future__ import annotations

import pytest
import torch

from fourbit.errors import InvalidBlockSize, NonFiniteWeight, UnsupportedDtype
from fourbit.formats import CODEBOOKS, NF4, Codebook
from fourbit.kernels import dispatch, ops


@pytest.mark.parametrize("book", CODEBOOKS.values(), ids=CODEBOOKS)
def test_every_element_takes_a_nearest_level(choice: str, book: Codebook) -> None:
    """By brute force, as the definition has it; the last block is shorter and the size odd."""
    weight = torch.randn(64 * 3 + 17, generator=torch.Generator().manual_seed(0))
    with dispatch.use(choice):
        packed, absmax = ops.quantize_blocks(weight, codebook=book)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[: weight.numel()].long()
    levels = torch.from_numpy(book.table)
    normalised = (weight.double() / absmax.double().repeat_interleave(64)[: weight.numel()]).unsqueeze(1)
    distance = (normalised - levels.double()).abs()
    chosen = distance.gather(1, codes.unsqueeze(1)).squeeze(1)
    # normalising rounds three times in fp32: absmax' reciprocal, the product, and the midpoint it is compared with
    assert bool((chosen <= distance.amin(dim=1) + 3 * 2**-23).all())
    assert torch.equal(absmax[:3], weight[:192].view(3, 64).abs().amax(dim=1))
    assert absmax[3] == weight[192:].abs().amax()


def test_a_tie_takes_the_lower_level(choice: str) -> None:
    midpoints = torch.from_numpy(NF4.thresholds)
    weight = torch.cat([torch.ones(1), midpoints, torch.zeros(16)])
    with dispatch.use(choice):
        packed, _ = ops.quantize_blocks(weight, block_size=32)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)
    assert codes[1:16].tolist() == list(range(15))


def test_an_odd_size_is_padded_with_the_code_of_zero(choice: str) -> None:
    with dispatch.use(choice):
        packed, _ = ops.quantize_blocks(torch.ones(5))
    assert packed.numel() == 3
    assert int(packed[-1]) & 15 == NF4.zero_code


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 100, 2080])
def test_what_is_not_finite_is_refused(choice: str, value: float, place: int) -> None:
    weight = torch.randn(2081)
    weight[place] = value
    with dispatch.use(choice), pytest.raises(NonFiniteWeight, match="NaN or infinity"):
        ops.quantize_blocks(weight)


@pytest.mark.parametrize("block_size", [0, 16, 48, 63, 8192, -64])
def test_block_sizes_that_nobody_reads(block_size: int) -> None:
    with pytest.raises(InvalidBlockSize, match=f"is {block_size}; it must be a power of two from 32 to 4096"):
        ops.quantize_blocks(torch.ones(64), block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64])
def test_dtypes_that_cannot_be_quantized(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedDtype, match=f"{dtype} cannot be quantized"):
        ops.quantize_blocks(torch.ones(64, dtype=dtype))


def test_opcheck() -> None:
    thresholds, codes = torch.from_numpy(NF4.thresholds), torch.from_numpy(NF4.ranked_codes)
    torch.library.opcheck(torch.ops.fourbit.quantize_blocks, (torch.randn(3, 50), thresholds, codes, 64))
