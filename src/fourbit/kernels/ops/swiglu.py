"""Contract: the gated activation of an MLP (SwiGLU, GEGLU)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference

__all__ = ["ACTIVATIONS", "swiglu"]

ACTIVATIONS = ("silu", "gelu_tanh")


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """Gate one projection by another: act(gate) * up.

        silu(x)      = x / (1 + e^-x)
        gelu_tanh(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

    Args:
        gate, up: [..., K], one shape and dtype.
        activation: one of `ACTIVATIONS`.

    Returns:
        [..., K]. act(gate) is computed in fp32 and rounded to the dtype before the product, as two operations would.

    Raises:
        ValueError: shapes or dtypes differ, or an unknown activation.

    Backward: act(gate) is computed anew; only gate and up are kept between the passes.

    Source: Shazeer 2020, arXiv:2002.05202.
    """
    _check(gate, up, activation)
    out: Tensor = torch.ops.fourbit.swiglu(gate, up, activation)
    return out


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {list(gate.shape)} of {gate.dtype}, up is {list(up.shape)} of {up.dtype}.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}; the choices are {', '.join(ACTIVATIONS)}.")


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    _check(gate, up, activation)
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return like(gate), like(up)


dispatch.define(
    "swiglu(Tensor gate, Tensor up, str activation) -> Tensor",
    stem="swiglu",
    reference=reference.swiglu,
    fake=_fake,
)
dispatch.define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    stem="swiglu",
    reference=reference.swiglu_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_gate, grad_up = torch.ops.fourbit.swiglu_backward(grad, *ctx.saved_tensors, ctx.activation)
    return grad_gate, grad_up, None


torch.library.register_autograd("fourbit::swiglu", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY)
dispatch.refuse_second_derivative("swiglu_backward")
