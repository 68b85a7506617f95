"""Where a run listens to the Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourbit.train.events import Began

if TYPE_CHECKING:
    from fourbit.train.trainer import FourbitTrainer

__all__ = ["RunCallback"]


class RunCallback(TrainerCallback):  # type: ignore[misc]
    """Reads the clock, and has every step logged that is saved or the last one."""

    def __init__(self, trainer: FourbitTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.on_event(Began(state.global_step, state.max_steps))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.judge_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.trainer.meter.end_step()
        if self.trainer.guard.is_over:  # with a checkpoint, if it is the records that are at fault and not the weights
            if not self.trainer.weights_are_good():
                self.trainer.give_up(good=False)
            control.should_save, control.should_evaluate = True, False
        if control.should_save or self.trainer.stop.requested or state.global_step >= state.max_steps:
            control.should_log = True  # nothing is saved whose loss was not looked at
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.guard.is_over:
            self.trainer.give_up(good=True)
