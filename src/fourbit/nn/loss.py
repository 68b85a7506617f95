"""The loss of a language model without its logits.

`causal_lm_loss` is the function: hidden states, head and labels in, loss out; see `kernels.ops.cross_entropy`.

`FusedHead`, `FusedCausalLM` and `FusedLoss` bring it into a model of another library without knowing the model. While
a training step runs, the head returns `LazyLogits`, which stand for its result. The model's own code carries them to
its loss function, scaling or capping them on the way as the architecture wants, and the loss function takes the hidden
states out of them. Any other use of them computes the real logits and goes on as ever, so a model that does something
unforeseen is slower and not wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.kernels import ops
from fourbit.nn.fused import Fused
from fourbit.nn.linear import QuantLinear

__all__ = ["FusedCausalLM", "FusedHead", "FusedLoss", "LazyLogits", "causal_lm_loss"]

IGNORE = -100
"""The label of a token that carries no loss."""


def causal_lm_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE,
    shift_labels: Tensor | None = None,
    scale: float = 1.0,
    cap: float = 0.0,
) -> Tensor:
    """The mean cross-entropy of the next token, as transformers' `ForCausalLMLoss` defines it.

    Args:
        hidden: [B, T, K], what the head would be given.
        head: an `nn.Linear` or a `QuantLinear`; the former's parameters get gradients if they want them.
        labels: [B, T] int64; token t is to predict label t + 1; `ignore_index` carries no loss.
        num_items_in_batch: what the sum is divided by; by default the number of labels that count.
        shift_labels: [B, T], used as they are in place of `labels`.
        scale, cap: what the model does to its logits: z = scale * logits, then cap * tanh(z / cap) unless cap is 0.

    Returns:
        [] fp32.

    Raises:
        IndexError: a label outside of the vocabulary. ValueError: shapes do not fit together.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden.device)
    weight, bias = _dense(head, hidden)
    total = ops.linear_cross_entropy(
        hidden.to(weight.dtype),
        weight,
        shift_labels,
        bias=bias,
        ignore_index=ignore_index,
        scale=scale,
        cap=cap,
    )
    if num_items_in_batch is None:
        return total / (shift_labels != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _dense(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias as numbers, in what its product runs in."""
    if not isinstance(head, nn.Linear):
        raise TypeError(f"A {type(head).__name__} is not a linear head.")
    bias: Tensor | None = head.bias
    if isinstance(head, QuantLinear):
        dtype, _ = head.dtypes(hidden)
        weight = head.quantized.dequantize(dtype)
    elif torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        weight = head.weight.to(dtype)
    else:
        return head.weight, bias
    return weight, None if bias is None else bias.to(dtype)


@dataclass(eq=False)
class LazyLogits:
    """Logits that were not computed. Whatever is done with them beyond scaling and capping computes them.

    They stand for z = cap * tanh(scale * x / cap), or scale * x where cap is 0, with x = compute(hidden).

    Attributes:
        head: the module whose result they are.
        hidden: [..., K], what it was given.
        compute: the head's own forward pass.
        squashed: between the hyperbolic tangent and the product that gives it its cap.
    """

    head: nn.Module
    hidden: Tensor
    compute: Callable[[Tensor], Tensor]
    scale: float = 1.0
    cap: float = 0.0
    squashed: bool = False
    computed: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether the loss can still be had without them."""
        return self.computed is None and not self.squashed

    def dense(self) -> Tensor:
        """The logits; computed once, so that what is written into them stays."""
        if self.computed is None:
            x = self.compute(self.hidden)
            if self.cap:
                self.computed = self.cap * torch.tanh(x * (self.scale / self.cap))
            else:
                self.computed = x if self.scale == 1.0 else x * self.scale
        return self.computed

    def float(self) -> LazyLogits | Tensor:
        """Themselves: the loss is computed in fp32 anyway."""
        return self if self.computed is None else self.computed.float()

    def contiguous(self) -> LazyLogits | Tensor:
        """Themselves."""
        return self if self.computed is None else self.computed.contiguous()

    def tanh(self) -> LazyLogits | Tensor:
        """tanh(scale x), whose cap is 1 until a product says otherwise."""
        if self.computed is not None or self.cap:
            return self.dense().tanh()
        return replace(self, cap=1.0, squashed=True)

    def _scaled(self, factor: Any) -> LazyLogits | Tensor:
        plain = type(factor) in (int, float) and factor > 0
        if self.computed is not None or not plain or (self.cap and not self.squashed):
            product: Tensor = self.dense() * factor
            return product
        if self.squashed:  # c tanh(a x) = cap tanh(scale x / cap) with cap = c, scale = a c
            return replace(self, cap=factor, scale=self.scale * factor, squashed=False)
        return replace(self, scale=self.scale * factor)

    def __mul__(self, other: Any) -> LazyLogits | Tensor:
        return self._scaled(other)

    def __rmul__(self, other: Any) -> LazyLogits | Tensor:
        return self._scaled(other)

    def __truediv__(self, other: Any) -> LazyLogits | Tensor:
        return self._scaled(1 / other) if type(other) in (int, float) and other else self.dense() / other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.tanh and len(args) == 1 and not kwargs:
            squashed: LazyLogits | Tensor = args[0].tanh()
            return squashed
        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.dense, (args, kwargs or {}))
        return function(*args, **kwargs)


def _forward_operators() -> None:
    """Python looks operators up on the class, so `LazyLogits.__getattr__` does not see them."""

    def forwarded(name: str) -> Callable[..., Any]:
        return lambda self, *args: getattr(self.dense(), name)(*args)

    names = "add radd sub rsub rtruediv pow neg matmul getitem setitem len lt le gt ge iter"
    for name in (f"__{word}__" for word in names.split()):
        setattr(LazyLogits, name, forwarded(name))


_forward_operators()


_DEFERRING = threading.local()
"""`heads`: those of the training step that this thread is in. Other threads may be asking the same model for logits."""


class FusedHead(Fused):
    """A linear head that puts its product off during a training step."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The head's own, or what stands for it."""
        compute = super().forward  # type: ignore[misc]
        deferring = any(head is self for head in getattr(_DEFERRING, "heads", ()))
        if deferring and len(args) == 1 and not kwargs:
            return LazyLogits(self, args[0], compute)  # type: ignore[arg-type]
        return compute(*args, **kwargs)


class FusedCausalLM(Fused):
    """A language model that never holds its logits in a training step: with labels given, `logits` comes back None."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, with its head deferring."""
        own = super().forward  # type: ignore[misc]
        if not self.training or kwargs.get("labels") is None:  # type: ignore[attr-defined]
            return own(*args, **kwargs)
        before = getattr(_DEFERRING, "heads", ())
        # peft may have wrapped the head, or put a trainable copy of it beside it
        modules = self.get_output_embeddings().modules()  # type: ignore[attr-defined]
        _DEFERRING.heads = tuple(head for head in modules if isinstance(head, FusedHead))
        try:
            return _without_logits(own(*args, **kwargs))
        finally:
            _DEFERRING.heads = before


def _without_logits(output: Any) -> Any:
    """The output of a model without what stands for its logits."""
    if isinstance(output, tuple):
        return tuple(part for part in output if not isinstance(part, LazyLogits))
    if not isinstance(output, Mapping):
        return output
    kept = {name: part for name, part in output.items() if not isinstance(part, LazyLogits)}
    return output if len(kept) == len(output) else type(output)(**kept)


@dataclass
class FusedLoss:
    """Takes the place of transformers' `ForCausalLMLoss`, which `plain` is, and gives logits that are real to it.

    Attributes:
        used: the dtype of the hidden states of the last loss that was had without logits; None if there was none yet.
    """

    plain: Callable[..., Tensor]
    used: torch.dtype | None = None

    def __call__(
        self,
        logits: Tensor | LazyLogits,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The mean cross-entropy; see `causal_lm_loss`."""
        wanted = labels if shift_labels is None else shift_labels
        if isinstance(logits, LazyLogits):
            head = logits.head
            fits = wanted.shape == logits.hidden.shape[:-1] and vocab_size == getattr(head, "out_features", None)
            if logits.pending and fits and isinstance(head, nn.Linear):
                self.used = logits.hidden.dtype
                return causal_lm_loss(
                    logits.hidden,
                    head,
                    labels,
                    num_items_in_batch=num_items_in_batch,
                    ignore_index=ignore_index,
                    shift_labels=shift_labels,
                    scale=logits.scale,
                    cap=logits.cap,
                )
            logits = logits.dense()
        return self.plain(
            logits,
            labels,
            vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )
