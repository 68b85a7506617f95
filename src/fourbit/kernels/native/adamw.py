"""Native: a step of AdamW with moments in 8 bits. csrc/kernels/adamw.cpp."""

from __future__ import annotations

import ctypes
import math

import numpy as np
from torch import Tensor

from fourbit.formats import dynamic_map, nearest_tables
from fourbit.kernels.moments import check_moments
from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads

__all__ = ["accepts_adamw_blockwise", "adamw_blockwise"]

_F32 = ctypes.c_float


class _Arguments(ctypes.Structure):
    """Mirrors FbAdamw. It holds addresses, so the tensors must outlive the call."""

    _fields_ = (
        *((name, POINTER) for name in ("params", "grads", "counts", "offsets")),
        ("segments", I64),
        ("dtype", I32),
        *((name, POINTER) for name in ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")),
        *((name, POINTER) for name in ("signed_levels", "unsigned_levels")),
        *((name, POINTER) for name in ("signed_first", "unsigned_first", "signed_middle", "unsigned_middle")),
        *((name, _F32) for name in ("beta1", "rest1", "beta2", "rest2", "kept", "step_size", "correction", "eps")),
    )


_call = bind("fb_adamw_blockwise", [POINTER, I32])
_LEVELS = tuple(np.ascontiguousarray(dynamic_map(signed=signed)) for signed in (True, False))
_FIRST = tuple(np.ascontiguousarray(nearest_tables(signed=signed)[0]) for signed in (True, False))
_MIDDLE = tuple(np.ascontiguousarray(nearest_tables(signed=signed)[1]) for signed in (True, False))


def accepts_adamw_blockwise(
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    params: list[Tensor],
    grads: list[Tensor],
    offsets: list[int],
    *numbers: float,
) -> str | None:
    """fp32, fp16 and bf16."""
    del numbers
    check_moments(exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax, params, grads, offsets)
    return f"it takes no {params[0].dtype}" if params and params[0].dtype not in DTYPES else None


def adamw_blockwise(
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
    """See `kernels.ops.adamw`."""
    if not params:
        return
    addresses, numbers = POINTER * len(params), I64 * len(params)
    arguments = _Arguments(
        ctypes.addressof(to := addresses(*[param.data_ptr() for param in params])),
        ctypes.addressof(of := addresses(*[grad.data_ptr() for grad in grads])),
        ctypes.addressof(counts := numbers(*[param.numel() for param in params])),
        ctypes.addressof(begins := numbers(*offsets)),
        len(params),
        DTYPES[params[0].dtype],
        *(x.data_ptr() for x in (exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)),
        *(table.ctypes.data for tables in (_LEVELS, _FIRST, _MIDDLE) for table in tables),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - lr * weight_decay,
        -lr / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        eps,
    )
    check(_call(ctypes.addressof(arguments), threads()), "fb_adamw_blockwise")
    del to, of, counts, begins  # until here they must be where their addresses say
