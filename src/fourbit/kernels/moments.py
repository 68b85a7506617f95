"""What every backend checks before it touches moments in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.formats import STATE_BLOCK_SIZE

__all__ = ["check_moments"]


def check_moments(
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    """Refuse what does not fit together; a kernel trusts its sizes.

    Raises:
        ValueError: see `kernels.ops.adamw`.
    """
    count = exp_avg.numel()
    blocks = -(-count // STATE_BLOCK_SIZE)
    codes, scales = (exp_avg, exp_avg_sq), (exp_avg_absmax, exp_avg_sq_absmax)
    if any(x.dtype != torch.uint8 or x.numel() != count or not x.is_contiguous() for x in codes):
        raise ValueError(f"The moments' codes are not {count} contiguous bytes each.")
    if any(x.dtype != torch.float32 or x.numel() != blocks or not x.is_contiguous() for x in scales):
        raise ValueError(f"The moments' scales are not {blocks} contiguous fp32 numbers each.")
    if not len(params) == len(grads) == len(offsets):
        raise ValueError(f"There are {len(params)} parameters, {len(grads)} gradients and {len(offsets)} offsets.")
    for param, grad, offset in zip(params, grads, offsets, strict=True):
        if param.dtype != params[0].dtype or grad.dtype != param.dtype or grad.shape != param.shape:
            raise ValueError(f"A parameter is {list(param.shape)} of {param.dtype}, its gradient {list(grad.shape)}.")
        if not param.is_contiguous() or not grad.is_contiguous() or param.device != exp_avg.device != grad.device:
            raise ValueError("Parameters and gradients must be contiguous and on the device of the moments.")
        if offset < 0 or offset % STATE_BLOCK_SIZE or offset + param.numel() > count:
            raise ValueError(f"{param.numel()} moments do not begin at {offset} of {count}.")
