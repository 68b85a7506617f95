"""Reference: quantize a weight, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.errors import NonFiniteWeight

__all__ = ["quantize_blocks"]

SMALLEST_ABSMAX = 1e-38
"""What a scale is raised to before it divides; bitsandbytes' constant."""


def quantize_blocks(weight: Tensor, thresholds: Tensor, codes: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See `kernels.ops.quantize.quantize_blocks`; thresholds [15] fp32, codes [16] uint8 by rank."""
    flat = weight.detach().reshape(-1).float()
    whole = flat.numel() - flat.numel() % block_size
    blocks, tail = flat[:whole].view(-1, block_size), flat[whole:]
    if not bool(torch.isfinite(flat).all()):
        raise NonFiniteWeight("The weight holds NaN or infinity and cannot be quantized.")

    absmax = blocks.abs().amax(dim=1)
    normalised = (blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if tail.numel():
        tail_absmax = tail.abs().amax().clamp(min=SMALLEST_ABSMAX).unsqueeze(0)
        absmax = torch.cat([absmax, tail_absmax])
        normalised = torch.cat([normalised, (tail / tail_absmax).clamp(-1, 1)])
    if normalised.numel() % 2:
        normalised = torch.nn.functional.pad(normalised, (0, 1))

    ranks = torch.bucketize(normalised, thresholds)
    by_element = codes[ranks]
    return (by_element[0::2] << 4) | by_element[1::2], absmax
