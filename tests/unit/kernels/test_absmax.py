"""The contract of double quantization: scales in 8 bits. Bits against the peer: tests/parity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fourbit.formats import dynamic_map
from fourbit.kernels import dispatch, ops


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000])
def test_the_error_is_at_most_a_step_of_the_map(choice: str, count: int) -> None:
    """Half the widest gap between neighbouring levels, a bin's width, and the roundings of fp32."""
    absmax = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.5
    with dispatch.use(choice):
        codes, nested_absmax, offset = ops.quantize_absmax(absmax)
        decoded = ops.dequantize_absmax(codes, nested_absmax, offset)
    assert (codes.numel(), nested_absmax.numel()) == (count, -(-count // 256))
    # 0.993 is the lowest level, so that -1 is off by as much as a gap
    step = float(np.diff(dynamic_map()).max()) / 2 + 1 / 65535 + 8 * 2**-24
    bound = step * nested_absmax.repeat_interleave(256)[:count] + 2**-22
    assert bool(((decoded - absmax).abs() <= bound).all())


def test_equal_scales_come_back_exactly(choice: str) -> None:
    """All of them are then the offset; a block of zeros has code 0 and the scale 0."""
    with dispatch.use(choice):
        codes, nested_absmax, offset = ops.quantize_absmax(torch.full((512,), 0.75))
        assert torch.equal(ops.dequantize_absmax(codes, nested_absmax, offset), torch.full((512,), 0.75))
    assert not codes.any()
    assert not nested_absmax.any()


def test_no_scales_at_all(choice: str) -> None:
    with dispatch.use(choice):
        codes, nested_absmax, offset = ops.quantize_absmax(torch.empty(0))
        assert ops.dequantize_absmax(codes, nested_absmax, offset).numel() == 0
    assert (codes.numel(), nested_absmax.numel(), float(offset)) == (0, 0, 0.0)


def test_opcheck() -> None:
    absmax = torch.rand(300)
    torch.library.opcheck(torch.ops.fourbit.quantize_absmax, (absmax, absmax.mean()))
    codes, nested_absmax, offset = ops.quantize_absmax(absmax)
    torch.library.opcheck(torch.ops.fourbit.dequantize_absmax, (codes, nested_absmax, offset))
