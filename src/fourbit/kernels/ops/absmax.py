"""Contract: double quantization, the scales themselves in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.formats import NESTED_BLOCK_SIZE, block_count
from fourbit.kernels import dispatch, reference

__all__ = ["dequantize_absmax", "quantize_absmax"]


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a tensor's scales to 8 bits, with one fp32 scale per 256 of them and one offset for all.

        offset   = mean(absmax)
        nested[h] = max |absmax[g] - offset|,  g in block h of 256
        code[g]  = dynamic8((absmax[g] - offset) / nested[h])

    Args:
        absmax: [G] fp32.

    Returns:
        codes: [G] uint8, indices into the dynamic map.
        nested_absmax: [ceil(G/256)] fp32.
        nested_offset: [] fp32. It is `torch.mean`, whose last bit depends on torch's thread count.

    Cost: 8 + 32/256 bits per scale in place of 32, so 0.127 instead of 0.5 bits per parameter at block size 64.

    Source: QLoRA, arXiv:2305.14314, section 3; bitsandbytes' CPU result to the bit, except for scales whose sum is
    beyond fp32: bitsandbytes stores an infinite offset then, and decodes to NaN.
    """
    offset = _mean(absmax)
    codes, nested_absmax = torch.ops.fourbit.quantize_absmax(absmax, offset)
    return codes, nested_absmax, offset


def _mean(absmax: Tensor) -> Tensor:
    """[] fp32; the sum that `torch.mean` takes may overflow where the mean does not."""
    if not absmax.numel():
        return absmax.new_zeros(())
    mean = absmax.mean()
    return mean if mean.device.type == "meta" or bool(mean.isfinite()) else absmax.double().mean().float()


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """Decode double-quantized scales: [G] uint8 to [G] fp32. Undoes `quantize_absmax` up to its rounding."""
    absmax: Tensor = torch.ops.fourbit.dequantize_absmax(codes, nested_absmax, nested_offset)
    return absmax


def _fake_quantize(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    nested = absmax.new_empty(block_count(absmax.numel(), NESTED_BLOCK_SIZE))
    return absmax.new_empty(absmax.numel(), dtype=torch.uint8), nested


def _fake_dequantize(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return codes.new_empty(codes.numel(), dtype=torch.float32)


dispatch.define(
    "quantize_absmax(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    stem="absmax",
    reference=reference.quantize_absmax,
    fake=_fake_quantize,
)
dispatch.define(
    "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_offset) -> Tensor",
    stem="absmax",
    reference=reference.dequantize_absmax,
    fake=_fake_dequantize,
)
