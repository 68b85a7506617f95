"""Reference: a linear head and its cross-entropy, in plain torch, a piece of the tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CHUNK_BYTES", "linear_cross_entropy"]

CHUNK_BYTES = 64 << 20
"""What the logits of one piece may take."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    cap: float,
    needs_grad_hidden: bool,
    needs_grad_weight: bool,
    needs_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `kernels.ops.cross_entropy`; gradients that are not needed are empty."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    scored = (labels != ignore_index).nonzero().view(-1)
    loss = hidden.new_zeros((), dtype=wide)
    grad_hidden = torch.zeros_like(rows) if needs_grad_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_grad_weight else weight.new_empty(0)
    grad_bias = torch.zeros_like(bias, dtype=wide) if needs_grad_bias and bias is not None else weight.new_empty(0)

    tokens = max(1, CHUNK_BYTES // (weight.shape[0] * wide.itemsize))
    for piece in scored.split(tokens):
        chunk, targets = rows[piece], labels[piece].unsqueeze(1)
        z = scale * torch.nn.functional.linear(chunk, weight, bias).to(wide)
        if cap:
            z = cap * torch.tanh(z / cap)
        log_p = torch.log_softmax(z, dim=-1)
        loss -= log_p.gather(1, targets).sum()
        grad = log_p.exp_().scatter_add_(1, targets, log_p.new_full(targets.shape, -1.0)) * scale
        if cap:
            grad *= 1 - (z / cap) ** 2
        grad = grad.to(hidden.dtype)
        if needs_grad_hidden:
            grad_hidden[piece] = grad @ weight
        if needs_grad_weight:
            grad_weight += grad.t() @ chunk
        if grad_bias.numel():
            grad_bias += grad.sum(dim=0, dtype=wide)
    return (
        loss,
        grad_hidden.view(hidden.shape) if needs_grad_hidden else grad_hidden,
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype if bias is None else bias.dtype),
    )
