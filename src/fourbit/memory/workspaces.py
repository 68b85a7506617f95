"""What an operation of ours holds while it runs, beyond its arguments and results.

Counted from the backends' code (kernels/native and kernels/triton): casts of the adapter to the compute dtype, the mask
of dropout, the decoded weight, the logits of one piece. On a CPU the decoded weight, the logits and attention's rows
lie in buffers that are kept from call to call, so they count once, by name; on a GPU the allocator has them back after
the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fourbit.memory.knobs import Knobs

__all__ = ["Workspace", "workspace_of"]

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 64 << 20}
"""Of the logits of one piece: CHUNK_BYTES of kernels/native/cross_entropy.py and kernels/triton/cross_entropy.py, which
cannot be imported where there are no such kernels; a test compares them."""

_FLASH_ROWS = 128
_FLASH_HEAD = 32
"""What torch's flash attention rounds the number of queries and the size of a head up to for its fp32 gradient."""


@dataclass(frozen=True)
class Workspace:
    """Bytes of one call.

    Attributes:
        transient: gone when it returns.
        kept: of buffers that stay, by name; each is as large as the largest call made it.
    """

    transient: int = 0
    kept: dict[str, int] = field(default_factory=dict)


def workspace_of(name: str, arguments: tuple[Any, ...], knobs: Knobs) -> Workspace:
    """What the operation `fourbit::NAME` holds beside arguments and results."""
    found = _COUNTS.get(name)
    return Workspace() if found is None else found(arguments, knobs)


def _decoded(rows: int, cols: int, itemsize: int, transient: int, others: int, knobs: Knobs) -> Workspace:
    """A call that decodes W [rows, cols] while it holds `transient`, and holds `others` at another time."""
    size_bytes = rows * cols * itemsize
    if knobs.device == "cpu":
        return Workspace(max(transient, others), {"decoded weight": size_bytes})
    return Workspace(max(transient + size_bytes, others))


def _linear(arguments: tuple[Any, ...], knobs: Knobs) -> Workspace:
    x, *_, out_features, _ = arguments
    return _decoded(out_features, x.shape[-1], x.element_size(), 0, 0, knobs)


def _linear_grad_input(arguments: tuple[Any, ...], knobs: Knobs) -> Workspace:
    grad, *_, in_features = arguments
    return _decoded(grad.shape[-1], in_features, grad.element_size(), 0, 0, knobs)


def _casts(x: Tensor, *matrices: Tensor) -> list[int]:
    """What the matrices of an adapter take in the dtype of x, where they are in another."""
    return [0 if matrix.dtype == x.dtype else matrix.numel() * x.element_size() for matrix in matrices]


def _mask(x: Tensor, dropout: float) -> tuple[int, int]:
    """The mask of dropout, and what it leaves of x."""
    return (x.numel(), x.nbytes) if dropout else (0, 0)


def _lora_linear(arguments: tuple[Any, ...], knobs: Knobs) -> Workspace:
    x, *_, lora_a, lora_b, _, _, dropout = arguments
    rank, features = lora_a.shape
    cast_a, cast_b = _casts(x, lora_a, lora_b)
    mask, left = _mask(x, dropout)
    share = x.numel() // features * rank * x.element_size()
    y = x.numel() // features * lora_b.shape[0] * x.element_size()
    if knobs.device == "cpu":  # y is there before the adapter's share
        return _decoded(lora_b.shape[0], features, x.element_size(), 0, mask + max(left + cast_a, cast_b), knobs)
    # s x A^T goes before W is decoded; while A is multiplied, y is not there yet
    first = mask + max(left + cast_a - y, share + cast_b)
    return _decoded(lora_b.shape[0], features, x.element_size(), mask + cast_b, first, knobs)


def _lora_linear_backward(arguments: tuple[Any, ...], knobs: Knobs) -> Workspace:
    _, x, xa, *_, lora_a, lora_b, _, _, dropout, needs_grad_x = arguments
    features = lora_a.shape[1]
    cast_a, cast_b = _casts(x, lora_a, lora_b)
    mask, left = _mask(x, dropout)
    held = mask + xa.nbytes  # dY B, as large as x A^T
    grads = max(cast_b - x.nbytes, left + cast_a - x.nbytes - lora_b.nbytes)  # before dX is there
    adapter = cast_a + (x.nbytes if dropout and knobs.device == "cpu" else 0)
    if not needs_grad_x:
        return Workspace(held + max(cast_b, left + cast_a))
    if knobs.device == "cpu":
        return _decoded(lora_b.shape[0], features, x.element_size(), 0, held + max(grads, adapter), knobs)
    return _decoded(lora_b.shape[0], features, x.element_size(), held, held + max(grads, adapter), knobs)


def _linear_cross_entropy(arguments: tuple[Any, ...], knobs: Knobs) -> Workspace:
    hidden, weight, *_, needs_grad_hidden, needs_grad_weight, _ = arguments
    vocabulary, size = weight.shape[0], weight.element_size()
    tokens = hidden.numel() // hidden.shape[-1]
    logits = min(max(1, CHUNK_BYTES[knobs.device] // (vocabulary * size)), tokens) * vocabulary * size
    # The last token of a sequence has no label, so labelled rows are copied, and so are their gradients.
    copies = hidden.nbytes * (2 if needs_grad_hidden else 1) + (weight.numel() * 4 if needs_grad_weight else 0)
    if knobs.device == "cpu":
        return Workspace(copies, {"logits": logits})
    return Workspace(copies + logits)


def _attention_backward(arguments: tuple[Any, ...], knobs: Knobs) -> Workspace:
    _, q, k, v, *_ = arguments
    batch, heads, queries, size = q.shape
    if knobs.device == "cpu":
        import torch

        group = heads // k.shape[1]
        per_thread = 4 * (group * queries * size + k.shape[2] * (size + v.shape[3]) * 2)
        return Workspace(0, {"attention": torch.get_num_threads() * per_thread})
    rounded = -(-queries // _FLASH_ROWS) * _FLASH_ROWS
    wide = batch * heads * rounded * (-(-size // _FLASH_HEAD) * _FLASH_HEAD + 1) * 4
    repeated = 0 if heads == k.shape[1] else batch * heads * k.shape[2] * (size + v.shape[3]) * k.element_size()
    return Workspace(wide + repeated)


_COUNTS: dict[str, Callable[[tuple[Any, ...], Knobs], Workspace]] = {
    "attention_backward": _attention_backward,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_grad_input": _linear_grad_input,
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
}
