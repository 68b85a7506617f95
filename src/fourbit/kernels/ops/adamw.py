"""Contract: a step of AdamW with moments in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference
from fourbit.kernels.moments import check_moments

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

    Error: every product, sum, quotient and root is rounded to the nearest fp32 number, in every backend, so that all
    agree to the bit. bitsandbytes decodes and computes so, too; but its CPU looks codes up by even bins of [-1, 1], and
    so may miss the nearest level by half a bin, scale / 65535.

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.
    """
    torch.ops.fourbit.adamw_blockwise(
        exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, list(params), list(grads), list(offsets), lr, betas[0],
        betas[1], eps, weight_decay, step,
    )  # fmt: skip


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
    check_moments(exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, params, grads, offsets)


dispatch.define(
    "adamw_blockwise(Tensor(a!) exp_avg, Tensor(b!) exp_avg_absmax, Tensor(c!) exp_avg_sq,"
    " Tensor(d!) exp_avg_sq_absmax, Tensor(e!)[] params, Tensor[] grads, int[] offsets, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, int step) -> ()",
    stem="adamw",
    reference=reference.adamw_blockwise,
    fake=_fake,
)
