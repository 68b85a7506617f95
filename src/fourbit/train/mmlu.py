"""MMLU beside every evaluation of a run, as the paper's recipes chose their checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourbit.evaluate import Exam, measure_mmlu
from fourbit.train.events import Said

if TYPE_CHECKING:
    from fourbit.train.trainer import FourbitTrainer

__all__ = ["MmluCallback"]


class MmluCallback(TrainerCallback):  # type: ignore[misc]
    """Asks the questions after each evaluation, and logs `eval_mmlu`. Nothing is drawn, so no result depends on it.

    Args:
        trainer: whose model is asked.
        exam: see `fourbit.evaluate.read_exam`.
        shots: worked examples before each question.
    """

    def __init__(self, trainer: FourbitTrainer, exam: Exam, *, shots: int) -> None:
        self.trainer, self.exam, self.shots = trainer, exam, shots

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add to the metrics, which may choose the best checkpoint."""
        score = measure_mmlu(
            self.trainer.model,
            self.trainer.processing_class,
            self.exam,
            shots=self.shots,
            batch_size=args.per_device_eval_batch_size,
        )
        metrics["eval_mmlu"] = score.accuracy
        self.trainer.log({"eval_mmlu": score.accuracy, "eval_mmlu_standard_error": score.standard_error})
        self.trainer.on_event(
            Said(f"MMLU after step {state.global_step}: {score.accuracy:.2%} ± {score.standard_error:.2%}.")
        )
