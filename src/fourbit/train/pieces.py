"""A batch cut into pieces that can be computed one after the other, with the gradients of the whole.

The loss of a step is a sum over the labels of all its batches, divided by their number, so it and its gradients are the
sums of those of the pieces. A batch of rows is cut between rows. A packed batch is one row of several examples that do
not see each other, and is cut between examples; the last tokens of a piece may be those of the next example, without
labels, so that lengths stay multiples of what the run pads to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fourbit.kernels.dropout import Part
from fourbit.nn.loss import IGNORE

__all__ = ["Piece"]


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a batch.

    Attributes:
        inputs: what the model takes: a batch like any other.
        packed: whether it is one row of several examples.
        part: which of the tokens of the whole batch.
        used: how many of its tokens count; further ones belong to the next piece.
        finished: the parameters whose gradients of this piece are there already.
    """

    inputs: Mapping[str, Any]
    packed: bool
    part: Part
    used: int
    finished: frozenset[Tensor] = frozenset()

    @classmethod
    def of_batch(cls, inputs: Mapping[str, Any], *, packed: bool) -> Piece:
        """The whole of it."""
        tokens = inputs["input_ids"].numel()
        return cls(inputs, packed, Part(0, tokens, tokens), tokens)

    @property
    def size(self) -> int:
        """Its rows, or the tokens of its examples."""
        return self.used if self.packed else len(self.inputs["input_ids"])

    @property
    def is_whole(self) -> bool:
        """Whether it is the batch itself."""
        return self.part.tokens == self.part.whole

    def cut(self, most: int | None, *, multiple: int = 1) -> list[Piece]:
        """Pieces of at most so many rows or tokens, in order; an example with more tokens is a piece by itself.

        Args:
            multiple: of which the lengths of packed pieces are, as far as the batch goes.
        """
        if most is None or self.size <= most:
            return [self]
        return self._cut_examples(most, multiple) if self.packed else self._cut_rows(most)

    def _cut_rows(self, most: int) -> list[Piece]:
        rows, width = self.inputs["input_ids"].shape
        pieces = []
        for first in range(0, rows, most):
            last = min(first + most, rows)
            inputs = {
                name: value[first:last] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
                for name, value in self.inputs.items()
            }
            part = Part(self.part.first + first * width, (last - first) * width, self.part.whole)
            pieces.append(Piece(inputs, False, part, part.tokens, self.finished))
        return pieces

    def _cut_examples(self, most: int, multiple: int) -> list[Piece]:
        starts = _starts(self.inputs["position_ids"][0, : self.used])
        edges = [0]
        for start, end in pairwise([*starts[1:], self.used]):
            if end - edges[-1] > most:
                edges.append(start)
        if len(edges) == 1:
            return [self]
        ends = [*edges[1:], self.used]
        return [self._tokens(first, last, multiple) for first, last in zip(edges, ends, strict=True)]

    def _tokens(self, first: int, last: int, multiple: int) -> Piece:
        """The piece from one token up to another, and what rounds its length up."""
        width = self.inputs["input_ids"].shape[1]
        end = min(width, first - (first - last) // multiple * multiple)
        inputs = {
            name: value[:, first:end] if isinstance(value, Tensor) and value.shape == (1, width) else value
            for name, value in self.inputs.items()
        }
        inputs["labels"] = inputs["labels"].clone()
        inputs["labels"][:, last - first :] = IGNORE
        _describe_examples(inputs)
        part = Part(self.part.first + first, end - first, self.part.whole)
        return Piece(inputs, True, part, last - first, self.finished)


def _starts(positions: Tensor) -> list[int]:
    """Where the examples of a packed row begin: a 0 before a 1; any other 0 is padding."""
    begins = (positions[:-1] == 0) & (positions[1:] == 1)
    starts: list[int] = begins.nonzero().flatten().tolist()
    return starts if starts[:1] == [0] else [0, *starts]


def _describe_examples(inputs: dict[str, Any]) -> None:
    """Say anew where the examples lie, in the forms that trl's collator adds for attention by lengths."""
    positions = inputs["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten()
    edges = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)
    lengths = edges.diff()
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in inputs:
            inputs[name] = edges
    for name in ("max_length_q", "max_length_k"):
        if name in inputs:
            inputs[name] = int(lengths.max())
    if "seq_idx" in inputs:
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=positions.device)
        inputs["seq_idx"] = torch.repeat_interleave(numbers, lengths)[None]
