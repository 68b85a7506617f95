"""Triton: a linear head and its cross-entropy, a kernel between two products of torch's.

The labelled tokens go through in pieces. For each, cuBLAS makes the logits, one program per token reads them twice
(once for the logarithm of the sum, online; once to write the gradient in their place), and cuBLAS multiplies that with
the head. Logits exist for one piece, in the dtype of the product, and never in fp32.

Which tokens carry a label has to be known on the host, as the products leave the others out. That waits for the device
once a step, when the forward pass is over and the host has nothing to queue: what the head costs for unlabelled tokens
(all of a question, in instruction data) is more.

Cost: 3 passes over the logits of a piece beside the products, the last two mostly from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourbit.kernels.triton.launch import EXACT, guard
from fourbit.kernels.triton.rounding import round_to

__all__ = ["CHUNK_BYTES", "accepts_linear_cross_entropy", "linear_cross_entropy"]

CHUNK_BYTES = 64 << 20
"""What the logits of one piece may take: 1,048 tokens of a vocabulary of 32,000, enough to fill a product."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK = 4096


@triton.jit
def _shaped(x, scale, cap, CAPPED: tl.constexpr):
    """What a model does to its logits; the hyperbolic tangent is 2 sigmoid(2 z) - 1."""
    z = scale * x
    if CAPPED:
        z = cap * (2.0 / (1.0 + tl.exp(-2.0 * z / cap)) - 1.0)
    return z


@triton.jit
def _to_gradients(
    logits, labels, losses, vocabulary, scale, cap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    label = tl.load(labels + row)
    own = _shaped(tl.load(logits + label).to(tl.float32), scale, cap, CAPPED)
    top = own  # finite where the loss is; no exponent below can then be of infinity less infinity
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(logits + col, mask=col < vocabulary, other=float("-inf")).to(tl.float32)
        z = tl.where(col < vocabulary, _shaped(x, scale, cap, CAPPED), float("-inf"))
        larger = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(z - larger), axis=0)
        top = larger
    tl.store(losses + row, tl.log(total) + (top - own))
    if GRADIENT:
        inverse = 1.0 / total
        for start in range(0, vocabulary, BLOCK):
            col = start + tl.arange(0, BLOCK)
            x = tl.load(logits + col, mask=col < vocabulary, other=0.0)
            z = _shaped(x.to(tl.float32), scale, cap, CAPPED)
            slope = tl.exp(z - top) * inverse - tl.where(col == label, 1.0, 0.0)
            if CAPPED:
                slope *= 1.0 - (z / cap) * (z / cap)
            tl.store(logits + col, round_to(slope * scale, x.dtype), mask=col < vocabulary)


def accepts_linear_cross_entropy(
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
) -> str | None:
    """fp32, fp16 and bf16."""
    if hidden.dtype not in _DTYPES or weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        return f"it takes one of fp32, fp16 and bf16 for hidden states and head, not {hidden.dtype} and {weight.dtype}"
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:-1]:
        return "there is not one int64 label per token"
    return None


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
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    scored = (labels != ignore_index).nonzero().view(-1)
    every = len(scored) == len(labels)
    if not every:
        rows, labels = rows[scored], labels[scored]
    vocabulary = weight.shape[0]
    if bool(((labels < 0) | (labels >= vocabulary)).any()):  # the device is idle here, so this waits for nothing more
        raise IndexError(f"A label lies outside of the vocabulary of {vocabulary}.")

    losses = hidden.new_empty(len(rows), dtype=torch.float32)
    grad_rows = torch.empty_like(rows) if needs_grad_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad_weight else None
    grad_bias = hidden.new_zeros(vocabulary, dtype=torch.float32) if needs_grad_bias else None
    needs_grad = needs_grad_hidden or needs_grad_weight or needs_grad_bias
    tokens = max(1, CHUNK_BYTES // (vocabulary * weight.element_size()))
    workspace = hidden.new_empty((min(tokens, len(rows)), vocabulary))
    for begin in range(0, len(rows), tokens):
        chunk = rows[begin : begin + tokens]
        logits = workspace[: len(chunk)]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        with guard(logits):
            _to_gradients[(len(chunk),)](
                logits, labels[begin : begin + tokens], losses[begin : begin + tokens], vocabulary, scale, cap,
                cap != 0, needs_grad, min(_BLOCK, triton.next_power_of_2(vocabulary)), num_warps=8, **EXACT,
            )  # fmt: skip
        if grad_rows is not None:
            torch.mm(logits, weight, out=grad_rows[begin : begin + tokens])
        if grad_weight is not None:
            grad_weight += logits.t() @ chunk
        if grad_bias is not None:
            grad_bias += logits.sum(dim=0, dtype=torch.float32)
    if grad_rows is not None and not every:
        grad_rows = torch.zeros_like(hidden).view(-1, hidden.shape[-1]).index_copy_(0, scored, grad_rows)
    return (
        losses.sum(),
        hidden.new_empty(0) if grad_rows is None else grad_rows.view(hidden.shape),
        weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype),
        weight.new_empty(0) if grad_bias is None else grad_bias.to(weight.dtype),
    )
