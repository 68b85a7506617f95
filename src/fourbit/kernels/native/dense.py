"""Native: a few rows times a weight that is not quantized. csrc/kernels/dense.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads

__all__ = ["FEW_ROWS", "accepts_dense", "dense"]

FEW_ROWS = {torch.bfloat16: 4, torch.float16: 8, torch.float32: 8}
"""The most rows, by dtype: beyond, torch's matrix product is as fast. Measured on AVX-512 with BF16, 32000 x 1024."""

_dense = bind("fb_dense", [POINTER, POINTER, I32, I64, I64, I64, POINTER, POINTER, I32])


def accepts_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """A few rows of fp32, fp16 or bf16."""
    if x.dtype not in DTYPES:
        return f"it takes no {x.dtype}"
    rows = x.numel() // max(1, x.shape[-1])
    if not 0 < rows <= FEW_ROWS[x.dtype]:
        return f"{rows} rows are for torch's matrix product"
    return None if weight.is_contiguous() else "the weight is not contiguous"


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `kernels.ops.dense`."""
    x = x.contiguous()
    outputs, features = weight.shape
    y = x.new_empty((*x.shape[:-1], outputs))
    if bias is not None:
        bias = bias.contiguous()
    status = _dense(
        x.data_ptr(),
        weight.data_ptr(),
        DTYPES[x.dtype],
        x.numel() // features,
        outputs,
        features,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        threads(),
    )
    check(status, "fb_dense")
    return y
