"""Native: a linear head and its cross-entropy. csrc/kernels/cross_entropy.cpp between two products of torch's."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads, workspaces

__all__ = ["CHUNK_BYTES", "accepts_linear_cross_entropy", "linear_cross_entropy"]

CHUNK_BYTES = 32 << 20
"""What the logits of one piece may take: small enough for a last-level cache, large enough for an efficient product."""

_F32 = ctypes.c_float
_cross_entropy = bind("fb_cross_entropy", [POINTER, I32, POINTER, I64, I64, _F32, _F32, I32, POINTER, I32])
_BAD_ARGUMENT = -1
_workspaces = workspaces()


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
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
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
    needs_grad = needs_grad_hidden or needs_grad_weight or needs_grad_bias
    scored = _Scored(hidden, labels, ignore_index)
    nll = hidden.new_empty(len(scored), dtype=torch.float32)
    grad_rows = torch.empty_like(scored.rows) if needs_grad_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad_weight else None
    grad_bias = hidden.new_zeros(weight.shape[0], dtype=torch.float32) if needs_grad_bias else None

    tokens = max(1, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))
    workspace = _workspace(min(tokens, len(scored)) * weight.shape[0], weight.dtype)
    for begin in range(0, len(scored), tokens):
        chunk = scored.rows[begin : begin + tokens]
        logits = workspace[: len(chunk) * weight.shape[0]].view(len(chunk), -1)
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        _to_gradients(
            logits, scored.labels[begin : begin + tokens], scale, cap, needs_grad, nll[begin : begin + tokens]
        )
        if grad_rows is not None:
            torch.mm(logits, weight, out=grad_rows[begin : begin + tokens])
        if grad_weight is not None:
            grad_weight += logits.t() @ chunk
        if grad_bias is not None:
            grad_bias += logits.sum(dim=0, dtype=torch.float32)
    return (
        nll.sum(),
        hidden.new_empty(0) if grad_rows is None else scored.scatter(grad_rows).view(hidden.shape),
        weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype),
        weight.new_empty(0) if grad_bias is None else grad_bias.to(weight.dtype),
    )


class _Scored:
    """The labelled tokens: `rows` [T', K] and `labels` [T'], and the way back to [T, K]."""

    def __init__(self, hidden: Tensor, labels: Tensor, ignore_index: int) -> None:
        self.rows, self.labels = hidden.reshape(-1, hidden.shape[-1]).contiguous(), labels.reshape(-1).contiguous()
        self._shape, self._positions = self.rows.shape, None
        labelled = self.labels != ignore_index
        if not bool(labelled.all()):
            self._positions = labelled.nonzero().view(-1)
            self.rows, self.labels = self.rows[self._positions], self.labels[self._positions]

    def __len__(self) -> int:
        return len(self.labels)

    def scatter(self, grad_rows: Tensor) -> Tensor:
        """Gradients of the labelled tokens among zeros for the others."""
        if self._positions is None:
            return grad_rows
        return grad_rows.new_zeros(self._shape).index_copy_(0, self._positions, grad_rows)


def _to_gradients(logits: Tensor, labels: Tensor, scale: float, cap: float, needs_grad: bool, nll: Tensor) -> None:
    rows, vocabulary = logits.shape
    status = _cross_entropy(
        logits.data_ptr(),
        DTYPES[logits.dtype],
        labels.data_ptr(),
        rows,
        vocabulary,
        scale,
        cap,
        needs_grad,
        nll.data_ptr(),
        threads(),
    )
    if status == _BAD_ARGUMENT:
        raise IndexError(f"A label lies outside of the vocabulary of {vocabulary}.")
    check(status, "fb_cross_entropy")


def _workspace(elements: int, dtype: torch.dtype) -> Tensor:
    """A buffer of this thread's that is kept from call to call."""
    kept: Tensor | None = getattr(_workspaces, "logits", None)
    if kept is None or kept.dtype != dtype or kept.numel() < elements:
        with torch.inference_mode(False):  # or it could never be written to again outside of that mode
            kept = _workspaces.logits = torch.empty(elements, dtype=dtype)
    return kept
