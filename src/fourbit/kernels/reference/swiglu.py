"""Reference: the gated activation of an MLP, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["swiglu", "swiglu_backward"]


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `kernels.ops.swiglu`."""
    return _activate(gate, activation) * up


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_activated = grad * up
    if activation == "silu":
        grad_gate = torch.ops.aten.silu_backward(grad_activated, gate)
    else:
        grad_gate = torch.ops.aten.gelu_backward(grad_activated, gate, approximate="tanh")
    return grad_gate, grad * _activate(gate, activation)


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")
