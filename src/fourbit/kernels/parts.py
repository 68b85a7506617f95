"""What a fast backend checks before it reads the parts of a quantized weight by address."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.formats import NESTED_BLOCK_SIZE

__all__ = ["refusal"]


def refusal(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    elements: int,
) -> str | None:
    """Why the kernels cannot read these parts; None if they can. A kernel trusts its sizes: here they are checked."""
    blocks = -(-elements // block_size)
    if packed.dtype != torch.uint8 or not packed.is_contiguous() or packed.numel() != (elements + 1) // 2:
        return f"the packed codes are not {(elements + 1) // 2} contiguous bytes"
    if not absmax.is_contiguous() or absmax.numel() != blocks:
        return f"there are not {blocks} contiguous scales"
    if levels.dtype != torch.float32 or levels.numel() != 16 or not levels.is_contiguous():
        return "the codebook is not 16 contiguous fp32 levels"
    if nested_absmax is None or nested_offset is None:
        return None if absmax.dtype == torch.float32 else f"plain scales are fp32, not {absmax.dtype}"
    if absmax.dtype != torch.uint8 or nested_absmax.dtype != torch.float32 or nested_offset.dtype != torch.float32:
        return "nested scales are uint8 codes with an fp32 absmax and offset"
    if nested_absmax.numel() != -(-blocks // NESTED_BLOCK_SIZE) or not nested_absmax.is_contiguous():
        return f"there is not one contiguous second-level scale per {NESTED_BLOCK_SIZE} scales"
    return None
