"""Contract: a linear head and the cross-entropy of its logits, in one piece.

The logits of a language model are its largest tensor: 4 x 256 tokens over a vocabulary of 32,000 take 131 MB in fp32,
and plain code holds them four times (16 bits, fp32, probabilities, gradient). Here they exist for one piece of the
tokens at a time, in the dtype of the product, and become their own gradient in place; the gradients of the inputs are
finished in the forward pass. Tokens without a label are never multiplied with the head.

    z    = scale * (h W^T + bias), then cap * tanh(z / cap) if there is a cap
    loss = sum over labelled tokens of log(sum_v e^(z_v)) - z_label

Source: the idea of finishing the gradients in the forward pass is Liger-Kernel's, arXiv:2410.10989, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit.kernels import dispatch, reference

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    cap: float = 0.0,
) -> Tensor:
    """The sum of the cross-entropies of all labelled tokens (see the module's head).

    Args:
        hidden: [..., K].
        weight: [V, K], dtype of `hidden`.
        labels: [...] int64, what each token is to predict (already shifted), or `ignore_index`.
        bias: [V].
        scale, cap: what is done to the logits before the softmax; a cap of 0 is none.

    Returns:
        [] fp32. Divide it by the number of labelled tokens for a mean.

    Raises:
        IndexError: a label outside of the vocabulary. ValueError: shapes or dtypes do not fit together.

    Cost: 2TVK flops, and as much again for each gradient that is needed; memory for the logits of one piece.

    Error: logits are rounded to the dtype of `hidden`, as a head's own are; the softmax is in fp32; the gradient of the
    logits is rounded to the dtype again, as autograd's is.
    """
    _check(hidden, weight, labels)
    grad = torch.is_grad_enabled()
    loss: Tensor = torch.ops.fourbit.linear_cross_entropy(
        hidden, weight, bias, labels, ignore_index, scale, cap,
        grad and hidden.requires_grad, grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )[0]  # fmt: skip
    return loss


def _fake(
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
    _check(hidden, weight, labels)

    def like(x: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format) if needed else x.new_empty(0)

    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty((), dtype=wide),
        like(hidden, needs_grad_hidden),
        like(weight, needs_grad_weight),
        like(weight if bias is None else bias, needs_grad_bias),
    )


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {list(hidden.shape)} of {hidden.dtype},"
            f" the head's weight {list(weight.shape)} of {weight.dtype}."
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(f"labels are {list(labels.shape)} of {labels.dtype}, not {list(hidden.shape[:-1])} of int64.")


dispatch.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, SymInt ignore_index, float scale,"
    " float cap, bool needs_grad_hidden, bool needs_grad_weight, bool needs_grad_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    stem="cross_entropy",
    reference=reference.linear_cross_entropy,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # the gradients were computed forward, so torch knows nothing of what they depend on
        raise NotImplementedError(dispatch.no_second_derivative("linear_cross_entropy"))
    found: list[Tensor | None] = [None] * 3
    if grad is not None:
        # The factor is a tensor without dimensions, so the product keeps the gradient's own dtype.
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        found = [saved * grad if needs else None for saved, needs in needed]
    return *found, None, None, None, None, None, None, None


torch.library.register_autograd(
    "fourbit::linear_cross_entropy", _backward, setup_context=_setup_context, lib=dispatch.LIBRARY
)
