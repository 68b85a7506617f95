"""The loss of each token of a batch under any causal language model, without the logits ever standing whole in fp32.

Logits are the largest tensor of an evaluation: 2,048 positions by 128,000 words are 1 GiB in fp32. So the model runs
once with its output head narrowed to the last position; the hidden states that were on their way into the head are
caught, and the head is applied to the positions that count, a piece at a time.

Some architectures change the logits after the head (Gemma 2 caps them, Cohere scales them). What they do is not asked
but seen: where the model's own logits at the last position are not bit for bit what the head alone gives, the model is
run as it is, and only the softmax is done in pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["IGNORED", "TokenLosses"]

IGNORED = -100
"""The target of a position that is not scored."""

PIECE_ELEMENTS = 1 << 24
"""Logits held in fp32 at one time: 64 MiB."""


class TokenLosses:
    """Scores batches of token ids under one model.

    Attributes:
        model: a transformers causal language model, in `eval()`; a peft model around one is fine.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._head: Any = self.model.get_output_embeddings()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods: -log p(targets[b, t] | input_ids[b, :t + 1]).

        Args:
            input_ids: [B, T] int64, padded on the right, where causal attention cannot see it.
            targets: [B, T] int64, `IGNORED` where nothing is scored.

        Returns:
            [n] fp32, in nats: one per scored position, row by row.
        """
        positions = (targets != IGNORED).flatten().nonzero().squeeze(1)
        wanted = targets.flatten()[positions]
        if self._head is not None:
            hidden = self._hidden_states(input_ids, self._head)
            if hidden is not None:
                return _in_pieces(lambda chosen: self._head(hidden[chosen]), positions, wanted)
            self._head = None
        logits = self.model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)
        return _in_pieces(lambda chosen: logits[chosen], positions, wanted)

    def _hidden_states(self, input_ids: Tensor, head: nn.Module) -> Tensor | None:
        """[B * T, H], what the model hands to its head; None if the logits are not simply the head's output."""
        caught: list[Tensor] = []

        def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if len(inputs) != 1 or inputs[0].shape[:2] != input_ids.shape:
                return None
            caught.append(inputs[0])
            return (inputs[0][:, -1:],)

        handle = head.register_forward_pre_hook(narrow)
        try:
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        finally:
            handle.remove()
        if len(caught) != 1:
            return None
        expected = head(caught[0][:, -1:])
        same = logits.shape == expected.shape and torch.equal(logits.float(), expected.float())
        return caught[0].flatten(0, 1) if same else None


def _in_pieces(logits_of: Any, positions: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of [n] targets whose logits come as [chosen, V] for a part of `positions` at a time."""
    losses = torch.empty(len(positions), device=positions.device)
    done, piece = 0, 1
    while done < len(positions):
        logits = logits_of(positions[done : done + piece]).float()
        losses[done : done + piece] = cross_entropy(logits, wanted[done : done + piece], reduction="none")
        done += piece
        piece = max(1, PIECE_ELEMENTS // logits.shape[-1])
    return losses
