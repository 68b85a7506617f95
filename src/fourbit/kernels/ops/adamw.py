"""Contract: a step of AdamW with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.formats import STATE_BLOCK_SIZE
from fourbit.kernels import dispatch, reference

__all__ = ["adamw_blockwise"]


def adamw_blockwise(
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update parameters whose moments m and v are 8-bit codes with an fp32 scale for each block of 256, all in place.

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        p = (1 - lr wd) p + (-lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    in fp32, from the decoded moments. Then each block of m and of v is encoded anew: its scale is its largest magnitude
    (NaN if it holds one), and its codes are the levels nearest to value / scale, in the signed and the unsigned dynamic
    map. The step itself uses m and v before they are encoded.

    Args:
        exp_avg, exp_avg_sq: [E] uint8.
        exp_avg_absmax, exp_avg_sq_absmax: [ceil(E/256)] fp32.
        params: contiguous, fp32, fp16 or bf16, all of one dtype.
        grads: of their shapes and dtype.
        offsets: where in E the moments of each parameter begin, a multiple of 256. No two share a block.
        step: t, from 1.

    Raises:
        ValueError: shapes, dtypes or offsets do not fit together.

    Cost: 4 bytes of moments and 12 of an fp32 parameter moved per element.

    Error: every product, sum, quotient and root is rounded to the nearest fp32 number, in every backend, so that all of
    them agree to the bit. bitsandbytes decodes and computes so, too; but its CPU looks codes up by even bins of [-1, 1],
    and so may miss the nearest level by half a bin, scale / 65535.

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """
    torch.ops.fourbit.adamw_blockwise(
        exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, list(params), list(grads), list(offsets), lr, betas[0],
        betas[1], eps, weight_decay, step,
    )  # fmt: skip


def check(
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    offsets: Sequence[int],
) -> None:
    """Refuse what no backend takes; a kernel trusts its sizes.

    Raises:
        ValueError: see `adamw_blockwise`.
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


def _fake(
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    check(exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, params, grads, offsets)


dispatch.define(
    "adamw_blockwise(Tensor(a!) exp_avg, Tensor(b!) exp_avg_absmax, Tensor(c!) exp_avg_sq,"
    " Tensor(d!) exp_avg_sq_absmax, Tensor(e!)[] params, Tensor[] grads, int[] offsets, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, int step) -> ()",
    stem="adamw",
    reference=reference.adamw_blockwise,
    fake=_fake,
)
