"""What holds for every tensor: backends agree, errors are bounded, blocks and scales act alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from fourbit.errors import BrokenCheckpoint
from fourbit.formats import CODEBOOKS
from fourbit.kernels import dispatch
from fourbit.kernels.native import unavailable
from fourbit.quant import QuantConfig, QuantizedTensor, quantize

FORMATS = st.sampled_from(list(CODEBOOKS))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
CONFIGS = st.builds(QuantConfig, format=FORMATS, block_size=st.sampled_from([32, 64, 128]), double_quant=st.booleans())
SMALLEST = 1e-38
"""What a scale is raised to before it divides."""


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any finite tensor: hypothesis likes zeros, subnormals and the largest numbers."""
    dtype = draw(DTYPES)
    shape = draw(st.tuples(st.integers(0, 300)) | st.tuples(st.integers(0, 12), st.integers(0, 40)))
    # within 1% of the largest fp32 number a scale in 8 bits may round past it, here as in bitsandbytes
    limit = 65504.0 if dtype == torch.float16 else 2e38
    limit = float(np.float32(limit))
    elements = st.floats(-limit, limit, width=32, allow_nan=False, allow_infinity=False)
    return torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=elements))).to(dtype)


def widest_gap(format: str) -> float:
    levels = np.sort(np.array(CODEBOOKS[format].levels))
    return float(np.diff(levels).max())


def by_block(flat: Tensor, block_size: int) -> Tensor:
    padding = -flat.numel() % block_size
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, block_size)


@pytest.mark.skipif(unavailable() is not None, reason=f"native kernels: {unavailable()}")
@given(tensors(), CONFIGS)
def test_native_is_the_reference(weight: Tensor, config: QuantConfig) -> None:
    with dispatch.use("reference"):
        expected = quantize(weight, config)
        values = expected.dequantize()
    ours = quantize(weight, config)
    assert torch.equal(ours.packed, expected.packed)
    assert torch.equal(ours.absmax, expected.absmax)
    assert torch.equal(ours.dequantize(), values)


@given(tensors(), FORMATS, st.sampled_from([32, 64, 128]))
def test_the_error_of_a_value_is_half_a_gap(weight: Tensor, format: str, block_size: int) -> None:
    """With scales in fp32: at most half the widest gap of the codebook, in units of the block's largest value.

    Where that is below 1e-38, which is what such a block is divided by, a value can only be told to be within it.
    """
    q = quantize(weight, QuantConfig(format=format, block_size=block_size, double_quant=False))
    flat = weight.float().double().reshape(-1)
    error = by_block(q.dequantize(torch.float32).double().reshape(-1) - flat, block_size).abs()
    largest = by_block(flat, block_size).abs().amax(dim=1, keepdim=True)
    # the reciprocal, the quotient, a threshold and the value are rounded
    bound = (widest_gap(format) / 2 + 8 * 2**-24) * largest + 2.0**-149
    assert (error <= torch.where(largest < SMALLEST, SMALLEST, bound)).all()


@given(tensors(), CONFIGS)
def test_the_scale_is_the_largest_value(weight: Tensor, config: QuantConfig) -> None:
    q = quantize(weight, QuantConfig(format=config.format, block_size=config.block_size, double_quant=False))
    largest = by_block(weight.float().reshape(-1), config.block_size).abs().amax(dim=1)
    whole = weight.numel() // config.block_size
    assert torch.equal(q.absmax[:whole], largest[:whole])
    assert torch.equal(q.absmax[whole:], largest[whole:].clamp(min=SMALLEST))


@given(tensors(), CONFIGS)
def test_double_quantization_moves_a_scale_little(weight: Tensor, config: QuantConfig) -> None:
    q = quantize(weight, QuantConfig(format=config.format, block_size=config.block_size, double_quant=True))
    plain = quantize(weight, QuantConfig(format=config.format, block_size=config.block_size, double_quant=False))
    assert torch.equal(q.packed, plain.packed)
    assert q.nested_absmax is not None
    assert q.nested_offset is not None
    assert q.nested_offset.isfinite()
    read = torch.ops.fourbit.dequantize_absmax(q.absmax, q.nested_absmax, q.nested_offset).double()
    # the 8-bit map's widest gap is below 0.0141, its lowest level is -0.993, and a bin adds 2/65535
    span = q.nested_absmax.double().repeat_interleave(256)[: plain.absmax.numel()]
    bound = 0.0075 * span + 4 * 2**-24 * (plain.absmax.double() + q.nested_offset.double().abs()) + 2.0**-140
    subnormal = span < 1.2e-38  # 1 / span is infinite, as it is in bitsandbytes
    assert ((read - plain.absmax.double()).abs() <= bound)[~subnormal].all()


@given(tensors(), CONFIGS)
def test_quantizing_again_changes_nothing(weight: Tensor, config: QuantConfig) -> None:
    """A decoded weight lies on its own levels; below the normal range fp32 cannot hold the levels apart."""
    config = QuantConfig(format=config.format, block_size=config.block_size, double_quant=False)
    first = quantize(weight.float(), config)
    nonzero = first.absmax[first.absmax > SMALLEST]
    assume(bool((nonzero > 1e-30).all()))
    assert torch.equal(quantize(first.dequantize(), config).dequantize(), first.dequantize())


@given(tensors(), CONFIGS, st.integers(-20, 20))
def test_a_power_of_two_passes_through(weight: Tensor, config: QuantConfig, exponent: int) -> None:
    config = QuantConfig(format=config.format, block_size=config.block_size, double_quant=False)
    factor = 2.0**exponent
    before = weight.float()
    magnitudes = before.abs()[before != 0]
    assume(bool(((magnitudes > 1e-25) & (magnitudes < 1e30)).all()))
    a, b = quantize(before, config), quantize(before * factor, config)
    assert torch.equal(a.packed, b.packed)
    whole = weight.numel() // config.block_size
    assert torch.equal(a.absmax[:whole] * factor, b.absmax[:whole])


@given(tensors(), CONFIGS, st.integers(0, 2**16))
def test_a_block_knows_nothing_of_the_others(weight: Tensor, config: QuantConfig, seed: int) -> None:
    config = QuantConfig(format=config.format, block_size=config.block_size, double_quant=False)
    flat, size = weight.reshape(-1), config.block_size
    assume(flat.numel() > size)
    changed = flat.clone()
    chosen = seed % (flat.numel() // size)
    changed[chosen * size : (chosen + 1) * size] = 1.0
    a, b = quantize(flat, config), quantize(changed, config)
    elsewhere = torch.ones(a.absmax.numel(), dtype=torch.bool)
    elsewhere[chosen] = False
    assert torch.equal(a.absmax[elsewhere], b.absmax[elsewhere])
    other = elsewhere.repeat_interleave(size)[: flat.numel()]
    assert torch.equal(a.dequantize()[other], b.dequantize()[other])


@given(tensors(), CONFIGS)
def test_files_give_back_what_was_written(weight: Tensor, config: QuantConfig) -> None:
    q = quantize(weight, config)
    read = QuantizedTensor.from_state_dict(q.state_dict("a.b"), "a.b")
    assert (read.shape, read.dtype, read.config) == (q.shape, q.dtype, q.config)
    assert torch.equal(read.dequantize(), q.dequantize())
    held = [q.packed, q.absmax, q.nested_absmax, q.nested_offset]
    assert q.nbytes == sum(part.numel() * part.element_size() for part in held if part is not None)
    assert q.numel() == math.prod(weight.shape)


@given(tensors(), CONFIGS, st.data())
def test_no_damage_to_a_file_goes_through_as_another_shape(
    weight: Tensor, config: QuantConfig, data: st.DataObject
) -> None:
    """Any one tensor cut short, or of another dtype, is refused by name: never decoded, never a crash."""
    written = quantize(weight, config).state_dict("w")
    key = data.draw(st.sampled_from([key for key in written if written[key].numel()]))
    part = written[key].reshape(-1)
    damaged = data.draw(st.sampled_from([part[:-1], torch.cat((part, part[:1])), part.to(torch.float64)]))
    with pytest.raises(BrokenCheckpoint, match=r"w(\.|\b)"):
        QuantizedTensor.from_state_dict(written | {key: damaged}, "w")
