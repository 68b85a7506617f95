"""Contract: root-mean-square norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0, round_first: bool = True) -> Tensor:
    """Scale every row to a root mean square of one, then by a weight.

        y = x / sqrt(mean(x^2) + eps) * (weight + offset)

    in fp32. Families of models differ in two points, and a checkpoint wants the one it was trained with: Gemma stores
    the weight less one (`offset` 1), and Llama rounds to the dtype of x before the weight is applied (`round_first`).

    Args:
        x: [..., K].
        weight: [K], dtype of `x`.

    Returns:
        [..., K], dtype of `x`.

    Raises:
        ValueError: the weight has another dtype than x, or another size than its rows.

    Backward: dx = r (g w - x r mean(g w x r)) and dweight = sum(g x r), with r = 1 / sqrt(mean(x^2) + eps) found anew;
    only x is kept between the passes.

    Error: rounding as above; r within (K/16 + 3) eps_32 of exact, in every backend.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    _check(x, weight)
    y: Tensor = torch.ops.fourbit.rms_norm(x, weight, eps, offset, round_first)
    return y


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dtype != x.dtype or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"The norm's weight is {list(weight.shape)} of {weight.dtype}; rows of {x.shape[-1]} {x.dtype} need it so."
        )


def _fake(x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool) -> Tensor:
    _check(x, weight)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, needs_grad_weight: bool
) -> tuple[Tensor, Tensor]:
    grad_weight = torch.empty_like(weight) if needs_grad_weight else weight.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format), grad_weight


dispatch.define(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool round_first) -> Tensor",
    stem="rms_norm",
    reference=reference.rms_norm,
    fake=_fake,
)
dispatch.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, float offset, bool needs_grad_weight)"
    " -> (Tensor, Tensor)",
    stem="rms_norm",
    reference=reference.rms_norm_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.fourbit.rms_norm_backward(grad, x, weight, ctx.eps, ctx.offset, needs_weight)
    return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None, None


torch.library.register_autograd("fourbit::rms_norm", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
dispatch.refuse_second_derivative("rms_norm_backward")
