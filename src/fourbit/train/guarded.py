"""The part of the trainer that deals with trouble: memory that does not suffice, and losses that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl
from trl import SFTTrainer

from fourbit.errors import InputError
from fourbit.models.out_of_memory import is_out_of_memory
from fourbit.train import checkpoints
from fourbit.train.arguments import PACKED_MULTIPLE
from fourbit.train.config import TrainConfig
from fourbit.train.events import Noted, OnEvent
from fourbit.train.guard import Guard, name_places
from fourbit.train.progress import Meter
from fourbit.train.rescue import Rescue

__all__ = ["GuardedTrainer"]


class GuardedTrainer(SFTTrainer):  # type: ignore[misc]  # trl is not followed
    """trl's trainer, with `rescue` around its batches and `guard` in front of its optimizer.

    Attributes:
        fault: what was wrong with the last of too many steps that were left out.
    """

    control: TrainerControl
    run_config: TrainConfig
    on_event: OnEvent
    meter: Meter
    fault: str | None = None
    _step_loss: Tensor | None = None
    _step_norm: Any = math.nan

    def prepare_for_trouble(
        self, model: nn.Module, config: TrainConfig, places: Callable[[Sequence[int]], list[str]] | None
    ) -> None:
        """Before anything else: what the other methods need.

        Args:
            places: where rows of the training data came from, for people; by default their numbers.
        """
        self.places = places or (lambda rows: [f"row {row + 1}" for row in rows])
        self.guard = Guard(config.max_skipped_steps)
        self.rescue = Rescue(
            model,
            packed=config.packing,
            multiple=PACKED_MULTIPLE,
            checkpoints=config.gradient_checkpointing,
            limit_bytes=config.memory_bytes,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which ends with what remains of the run.

        Raises:
            InputError: the memory does not suffice, or too many steps in a row gave no numbers.
        """
        with self.rescue.attached():
            try:
                return super().train(*args, **kwargs)
            except InputError as error:
                raise InputError(f"{error}{self._what_remains()}") from error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    f"Step {self.state.global_step + 1} ran out of memory beside its batches, in the optimizer's step"
                    f" or in saving ({_first_words(error)}); take a smaller `lora_r`, or fewer `target_modules`."
                    f"{self._what_remains()}"
                ) from None

    def _what_remains(self) -> str:
        left = checkpoints.list_checkpoints(Path(self.args.output_dir))
        return f" {left[-1].name} remains, and --resume goes on from it." if left else ""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of one batch; gradients are added to those of the batches before.

        What is returned goes into the mean that is logged. So the last batch of a step gives the loss of the whole
        step, and 0 where that is no number; those before it give 0.
        """
        before = self.rescue.most, self.rescue.checkpointing
        run = super().training_step
        loss = self.rescue.train(inputs, lambda piece: run(model, piece, num_items_in_batch))
        if (self.rescue.most, self.rescue.checkpointing) != before:
            self._note("out_of_memory", self._how_rescued())
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        if not self.accelerator.sync_gradients:
            return torch.zeros_like(loss)
        return torch.nan_to_num(self._step_loss, nan=0.0, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._step_norm = norm
        return norm

    def judge_step(self) -> None:
        """Before the weights change: leave the step out if there is something wrong with it."""
        assert self._step_loss is not None
        scaler = self.accelerator.scaler
        scale = None if scaler is None else float(scaler.get_scale())
        loss, norm, self._step_loss = float(self._step_loss), float(self._step_norm), None
        step = self.state.global_step + 1
        fault = self.guard.judge(step, loss, norm, scale=scale)
        if math.isfinite(loss):
            self.meter.logged_steps += 1
            if fault is None and (sentence := self.guard.watch(loss)):
                self._note("diverged", f"Step {step}: {sentence}")
        if fault is None:
            return
        for parameter in self.model.parameters():
            parameter.grad = (
                None  # no optimizer touches what has none; a scaler has seen them when their norm was taken
            )
        self._note("skipped", f"Step {step} is left out, as {fault}: {name_places(self.places(self._rows_of(step)))}.")
        if self.guard.is_over:
            self.fault = fault

    def _rows_of(self, step: int) -> list[int]:
        """Which rows of the training data a step takes; steps count from 1."""
        sampler = self._get_train_sampler()
        each, together = self.args.train_batch_size, self.args.gradient_accumulation_steps
        rows = len(sampler) // each * each if self.args.dataloader_drop_last else len(sampler)
        steps = max(1, math.ceil(math.ceil(rows / each) / together))
        epoch, within = divmod(step - 1, steps)
        sampler.set_epoch(epoch)
        order = list(sampler)[:rows]
        return order[within * each * together : (within + 1) * each * together]

    def give_up(self, *, good: bool) -> None:
        """End the run.

        Raises:
            InputError.
        """
        step, most, rate = self.state.global_step, self.guard.most, self.run_config.learning_rate
        rows = name_places(self.places(self._rows_of(step)))
        lower = f"lower `learning_rate` ({rate:g})"
        advice = f"Look at these records, or {lower}." if good else f"Good records give none either now; {lower}."
        raise InputError(
            f"{most} {'step' if most == 1 else 'steps in a row'} gave no numbers and changed nothing, the last of them"
            f" step {step}: {self.fault}, with {rows}. {advice}"
        )

    def _note(self, kind: str, sentence: str) -> None:
        """Say it, and write it down."""
        step = self.state.global_step + 1
        self.state.log_history.append({"step": step, "event": kind, "sentence": sentence})
        self.on_event(Noted(step, kind, sentence))

    def _how_rescued(self) -> str:
        rescue, args = self.rescue, self.args
        most = "an example" if rescue.packed and rescue.most is None else f"{rescue.most} tokens"
        most = most if rescue.packed else "1 row" if rescue.most in (None, 1) else f"{rescue.most} rows"
        checkpointing = " and with gradient checkpointing" if rescue.checkpointing else ""
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return (
            f"Step {self.state.global_step + 1} ran out of memory. It was done again with at most {most} at a"
            f" time{checkpointing}, and so are all that follow; the effective batch is still {rows} rows."
        )


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
