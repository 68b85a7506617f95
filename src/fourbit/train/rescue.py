"""A step that runs out of memory is done again in smaller pieces, and counts as if nothing had been.

The same batch. The pieces are normalised by the labels of the whole step, so the effective batch and the loss stay.

The same random numbers. They are put back to where the batch began, for every piece: each draws as often as the whole
would, and takes its part of the masks of the whole (`kernels.dropout.cut_masks`). Afterwards they stand where one pass
over the whole would have left them, so that the rest of the run sees the same, too.

The same gradients, without a copy of them. A parameter's gradient is added to what earlier batches left in one go, at
the end of its own backward pass. Whatever the failed attempt had added by then is the gradient of the whole piece, and
stays; the smaller pieces leave those parameters out. So there is nothing to take back, and no second buffer. What is
left is the rounding of sums in another order.

Exempt from "the same" are losses that are no sum over tokens (the balance of experts), and dropout in places that no
module of torch's or ours knows of (inside of an attention kernel): they are of the same distribution.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.kernels.dropout import cut_masks
from fourbit.models.out_of_memory import run_in_pieces
from fourbit.models.prepare import enable_checkpointing
from fourbit.train.pieces import Piece
from fourbit.train.watch import MemoryWatch

__all__ = ["RESCUE_FILE", "Rescue"]

RESCUE_FILE = "rescue.json"

Inputs = Mapping[str, Any]


class _NothingLeft(Exception):
    """The failed attempt had finished all gradients, so that of this piece only the loss is wanted."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Rescue:
    """Does the batches of a run, in pieces where they do not fit.

    Args:
        model: with adapters.
        packed: whether batches are rows of several examples.
        multiple: of which the lengths of packed rows are.
        checkpoints: whether activations are computed again already, in place of being kept.
        limit_bytes: what the run may use; None for all there is.

    Attributes:
        most: rows, or tokens of a packed row, that are trained on at a time; None while every batch fitted.
        scored: the same of evaluation.
        checkpointing: whether it was turned on here, as one row did not fit without it.
    """

    def __init__(
        self, model: nn.Module, *, packed: bool, multiple: int, checkpoints: bool, limit_bytes: int | None = None
    ) -> None:
        self.model, self.packed, self.multiple = model, packed, multiple
        self.most: int | None = None
        self.scored: int | None = None
        self.checkpointing = False
        self._checkpoints = checkpoints
        self._limit_bytes = limit_bytes
        self._watch = None if limit_bytes is None or torch.cuda.is_available() else MemoryWatch(limit_bytes)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._finished: set[Tensor] = set()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """For the time of a training: see which gradients are finished, and keep to the memory limit."""
        with ExitStack() as stack:
            for parameter in self._parameters:
                stack.callback(parameter.register_post_accumulate_grad_hook(self._finish).remove)
            if self._watch is not None:
                stack.enter_context(self._watch.watching(self.model))
            elif self._limit_bytes is not None:
                stack.enter_context(_limited(self._limit_bytes))
            yield

    def _finish(self, parameter: Tensor) -> None:
        self._finished.add(parameter)
        if self._watch is not None:
            self._watch.look()

    def train(self, inputs: Inputs, work: Callable[[Inputs], Tensor]) -> Tensor:
        """The loss of a batch, whose gradients are added to those that there are.

        Args:
            work: computes the loss of a batch, and adds its gradients.

        Raises:
            InputError: not even one row fits.
        """
        state = _random_state()

        def attempt(piece: Piece) -> Tensor:
            _set_random_state(state)
            return self._attempt(piece, work)

        def cut(piece: Piece) -> list[Piece]:
            return piece.cut(self.most, multiple=self.multiple)

        whole = Piece.of_batch(inputs, packed=self.packed)
        losses = [loss for _, loss in run_in_pieces(whole, attempt, cut=cut, make_smaller=self._make_smaller)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _attempt(self, piece: Piece, work: Callable[[Inputs], Tensor]) -> Tensor:
        self._finished = set()
        if self._watch is not None:
            self._watch.begin()
        masks: AbstractContextManager[None] = nullcontext() if piece.is_whole else cut_masks(piece.part)
        with masks, _without_gradients(piece.finished):
            try:
                return work(piece.inputs)
            except _NothingLeft as done:
                return done.loss

    def check(self, loss: Tensor) -> None:
        """To be called with a loss before its backward pass, which is left out if all gradients are there already."""
        if not loss.requires_grad:
            raise _NothingLeft(loss.detach())

    def _make_smaller(self, piece: Piece, reason: str) -> list[Piece]:
        piece = replace(piece, finished=piece.finished | self._finished)
        pieces = piece.cut((piece.size + 1) // 2, multiple=self.multiple)
        if len(pieces) > 1:
            self.most = (piece.size + 1) // 2
            return pieces
        if not self._checkpoints:
            try:
                self.turn_on_checkpointing()
            except InputError:
                raise InputError(self._sentence(piece, reason)) from None
            return pieces
        raise InputError(self._sentence(piece, reason))

    def turn_on_checkpointing(self) -> None:
        """Compute activations again in the backward pass.

        Raises:
            InputError: the model cannot.
        """
        enable_checkpointing(self.model)
        self.checkpointing = self._checkpoints = True

    def evaluate(self, inputs: Inputs, work: Callable[[Inputs], Tensor]) -> Tensor:
        """The sum of what the work gives for a batch, or for its pieces. It draws no random numbers.

        Raises:
            InputError: not even one row fits.
        """
        whole = Piece.of_batch(inputs, packed=self.packed)

        def attempt(piece: Piece) -> Tensor:
            if self._watch is not None:
                self._watch.begin()
            return work(piece.inputs)

        def cut(piece: Piece) -> list[Piece]:
            return piece.cut(self.scored, multiple=self.multiple)

        done = run_in_pieces(whole, attempt, cut=cut, make_smaller=self._halve_scored)
        return torch.stack([found for _, found in done]).sum(dim=0)

    def _halve_scored(self, piece: Piece, reason: str) -> list[Piece]:
        pieces = piece.cut((piece.size + 1) // 2, multiple=self.multiple)
        if len(pieces) == 1:
            raise InputError(self._sentence(piece, reason, doing="in evaluation"))
        self.scored = (piece.size + 1) // 2
        return pieces

    def _sentence(self, piece: Piece, reason: str, doing: str = "") -> str:
        tokens = piece.used if piece.packed else piece.inputs["input_ids"].shape[1]
        what = "example" if piece.packed else "row"
        checkpointing = " even with gradient checkpointing" if self._checkpoints and not doing else ""
        limit = "raise `memory`, or " if self._limit_bytes is not None else ""
        return (
            f"One {what} of {tokens:,} tokens alone does not fit into memory{' ' * bool(doing)}{doing}{checkpointing}"
            f" ({reason[:200].rstrip('.')}); {limit}lower `max_length` or `lora_r`, or take a smaller model."
        )

    # What a resumed run goes on with

    def save(self, path: Path) -> None:
        """Write it down."""
        kept = {"most": self.most, "scored": self.scored, "checkpointing": self.checkpointing}
        path.write_text(json.dumps(kept), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take up what `save` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        self.most, self.scored = found["most"], found["scored"]
        if found["checkpointing"] and not self._checkpoints:
            self.turn_on_checkpointing()


@contextmanager
def _without_gradients(parameters: frozenset[Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Of the CPU and of the GPU that is computed on."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@contextmanager
def _limited(limit_bytes: int) -> Iterator[None]:
    """Let torch's allocator refuse what goes beyond a limit, in place of the device."""
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    set_share = partial(torch.cuda.set_per_process_memory_fraction, device=device)
    set_share(min(1.0, limit_bytes / total))
    try:
        yield
    finally:
        set_share(1.0)
