"""One training run, from a config to an adapter and its report."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.errors import InputError
from fourbit.files import replace_file
from fourbit.models.folders import disk_problem, name_disk_problem
from fourbit.train import checkpoints
from fourbit.train.config import TrainConfig
from fourbit.train.events import Event, OnEvent, Said
from fourbit.train.folder import (
    HISTORY_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULT_KEYS,
    SAMPLES_FILE,
    RunFolder,
    read_metrics,
)
from fourbit.train.interrupt import stopping_on_signals

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from fourbit.train.interrupt import Stop
    from fourbit.train.material import Material
    from fourbit.train.samples import Sample
    from fourbit.train.trainer import FourbitTrainer

__all__ = ["TrainResult", "look", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
        output: the folder with the adapter, the tokenizer, `metrics.json` and `report.html`.
        finished: False where Ctrl-C stopped it; then only its checkpoints are there, and `resume` takes them up.
        steps: done, those of earlier parts of the run included.
        tokens: trained on, without padding, likewise.
        train_loss: the mean over all steps.
        eval_loss: per labelled token, after the last step; None without evaluation data.
        tokens_per_second: non-pad tokens by step time, without the first two steps, evaluation and saving; None for a
            run of less than three.
        peak_bytes: of this process, or allocated on the GPU.
        planned_bytes: what `peak_bytes` was planned to be; None of a model of which no step can be rehearsed.
        resumed_from: the step whose checkpoint this part of the run took up.
        metrics: what `metrics.json` holds.
        model, tokenizer: as they were trained, in evaluation mode; None where an earlier run had finished already.
    """

    output: Path
    finished: bool
    steps: int
    tokens: int
    train_loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    peak_bytes: int
    planned_bytes: int | None
    resumed_from: int | None
    metrics: dict[str, Any] = field(default_factory=dict, repr=False)
    model: PeftModel | None = field(default=None, repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, on_event: OnEvent | None = None
) -> TrainResult:
    """Finetune a model.

    Ctrl-C lets the step end, saves a checkpoint and returns a result that is not `finished`.

    Args:
        config: what to do.
        resume: go on from the newest checkpoint in `config.output`; without one start anew.
        overwrite: replace what an earlier run left in `config.output`.
        on_event: is told what goes on; see `events`.

    Raises:
        InputError: a fault in the config, the model, the data or the output; nothing is written then. The loss became
            infinite or no number; the checkpoints before that remain.
    """
    tell = on_event or _say_nothing
    config, folder, material = look(config, resume=resume, overwrite=overwrite, on_event=tell)
    if material is None:
        return _result(folder.path, read_metrics(folder.path), finished=True)
    try:
        return _Run(config, folder, material, tell).go()
    except Exception as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        left = checkpoints.list_checkpoints(folder.path)
        hint = f" {left[-1].name} remains, and --resume goes on from it once that is mended." if left else ""
        raise InputError(f"{folder.path} could not be written: {name_disk_problem(problem)}.{hint}") from error
    finally:
        folder.leave()


def look(
    config: TrainConfig, *, resume: bool, overwrite: bool, on_event: OnEvent
) -> tuple[TrainConfig, RunFolder, Material | None]:
    """Read and check all that a run takes except its model, and touch nothing.

    Returns:
        the config as this machine can follow it, the output, and what to train on; None for a run that has finished.

    Raises:
        InputError: see `train`.
    """
    from fourbit.train.precision import settle_precision

    _check_processes()
    config, instead = settle_precision(config)
    if instead:
        on_event(Said(instead))
    folder = RunFolder.look(config, resume=resume, overwrite=overwrite)
    if folder.sentence:
        on_event(Said(folder.sentence))
    if folder.finished:
        return config, folder, None
    from fourbit.train.arguments import arguments, check_trackers
    from fourbit.train.material import open_material

    material = open_material(config, on_event=on_event)
    folder.check_contents(material.contents(config))
    check_trackers(arguments(config, evaluates=material.evaluation is not None))
    return config, folder, material


def _check_processes() -> None:
    """Refuse to be one of several processes, which would write into one folder.

    Raises:
        InputError.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise InputError(
            f"A run takes one process and one GPU, and this is one of {processes} (WORLD_SIZE); start it without"
            " torchrun or accelerate."
        )


def _say_nothing(event: Event) -> None:
    pass


def _result(output: Path, metrics: dict[str, Any], *, finished: bool, **objects: Any) -> TrainResult:
    keys = {name: metrics[name] for name in RESULT_KEYS}
    return TrainResult(output=output, finished=finished, metrics=metrics, **keys, **objects)


class _Run:
    """The part of a run after its input was found good."""

    def __init__(self, config: TrainConfig, folder: RunFolder, material: Material, tell: OnEvent) -> None:
        self.config, self.folder, self.material, self.tell = config, folder, material, tell
        self.asked = config  # whoever takes the run up asks for the same
        self.samples: list[Sample] = []
        self.started = time.perf_counter()

    def go(self) -> TrainResult:
        from fourbit.train.model import count_parameters, load_trainable
        from fourbit.train.packing import keeps_apart
        from fourbit.train.planning import plan_run, probe, process_bytes

        self.plan = plan_run(self.config, self.material)
        self.tell(Said(self.plan.sentence))
        self.bytes_before = process_bytes()
        model = load_trainable(self.config)
        if self.config.packing and not keeps_apart(model):
            self.tell(Said("This model lets packed examples see each other, so each has a row of its own."))
            self.config, self.material = self.config.with_(packing=False), self.material.unpacked()
        self.trainable, self.parameters = count_parameters(model)
        self.tell(Said(self._what_is_trained()))
        with stopping_on_signals(self._say_stopping) as stop:
            trainer = self._make_trainer(model, stop)
            self._ask_mmlu(trainer)
            self.folder.begin(self.asked)
            if self.folder.checkpoint is None and (sentence := probe(trainer, self.material)) is not None:
                self.tell(Said(sentence))
            self._ask_before(model)
            self._train(trainer)
            self._evaluate_last(trainer, stop)
            if stop.requested and not self._is_complete(trainer):
                return self._stopped(trainer)
        return self._finish(trainer)

    def _what_is_trained(self) -> str:
        rows, steps = len(self.material.rows), self.material.steps(self.config)
        share = self.trainable / self.parameters
        return (
            f"Training {self.trainable:,} of {self.parameters:,} parameters ({share:.2%}) on {rows:,}"
            f" {'rows' if self.config.packing else 'examples'}, {steps:,} steps."
        )

    def _say_stopping(self) -> None:
        self.tell(Said("Stopping after this step; press Ctrl-C again to stop at once."))

    def _make_trainer(self, model: PeftModel, stop: Any) -> FourbitTrainer:
        from fourbit.train.trainer import FourbitTrainer

        try:
            return FourbitTrainer(
                model,
                config=self.config,
                tokenizer=self.material.tokenizer,
                train_data=self.material.rows,
                eval_data=self.material.eval_rows,
                stop=stop,
                on_event=self.tell,
                places=self.material.places,
            )
        except (ImportError, RuntimeError, ValueError) as error:
            if "DataParallel" in str(error):
                raise InputError(
                    "Several GPUs are visible, and a run takes one; show it one with CUDA_VISIBLE_DEVICES=0."
                ) from error
            if isinstance(error, RuntimeError):
                raise
            sentence = " ".join(str(error).split())
            raise InputError(f"The training cannot be set up so: {sentence}") from error

    def _ask_mmlu(self, trainer: FourbitTrainer) -> None:
        if self.material.exam is not None:
            from fourbit.train.mmlu import MmluCallback

            trainer.add_callback(MmluCallback(trainer, self.material.exam, shots=self.config.mmlu_shots))

    def _train(self, trainer: FourbitTrainer) -> None:
        checkpoint = self.folder.checkpoint
        if checkpoint is None:
            trainer.train()
            return
        trainer.take_up(checkpoint)
        if checkpoints.step_of(checkpoint) >= self.material.steps(self.config):
            trainer.restore(checkpoint)  # it was stopped between its last step and its report
            return
        trainer.train(resume_from_checkpoint=str(checkpoint))

    def _is_complete(self, trainer: FourbitTrainer) -> bool:
        """Whether the last step is done and scored."""
        state = trainer.state
        scored = [row["step"] for row in state.log_history if "eval_loss" in row]
        return state.global_step >= state.max_steps and (self.material.eval_rows is None or state.global_step in scored)

    def _evaluate_last(self, trainer: FourbitTrainer, stop: Stop) -> None:
        """Evaluate after the last step, unless the Trainer just did."""
        if not stop.requested and not self._is_complete(trainer):
            trainer.evaluate()

    # What the model answers before and after

    def _ask_before(self, model: PeftModel) -> None:
        from fourbit.train.samples import Sample, choose

        file = self.folder.path / SAMPLES_FILE
        if self.folder.checkpoint is not None and file.exists():
            self.samples = [Sample(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
            return
        if not self.config.samples:
            return
        data = self.material.train if self.material.evaluation is None else self.material.evaluation
        self.samples = choose(
            data, self.material.tokenizer, count=self.config.samples, longest=self.material.max_length
        )
        self._ask(model, "before")
        self._write(SAMPLES_FILE, json.dumps([sample.to_dict() for sample in self.samples], indent=1))

    def _ask(self, model: PeftModel, field_name: str) -> None:
        from fourbit.train.samples import answer

        if self.samples:
            self.tell(Said(f"Asking {len(self.samples)} questions {field_name} the training."))
            tokenizer, longest = self.material.tokenizer, self.config.sample_tokens
            self.samples = answer(model, tokenizer, self.samples, field=field_name, longest=longest)

    # What is left behind

    def _stopped(self, trainer: FourbitTrainer) -> TrainResult:
        metrics = self._metrics(trainer)
        objects = {"model": trainer.model.eval(), "tokenizer": self.material.tokenizer}
        return _result(self.folder.path, metrics, finished=False, **objects)

    def _finish(self, trainer: FourbitTrainer) -> TrainResult:
        from fourbit.train.record import history_rows, to_jsonl
        from fourbit.train.report import write_report

        model = trainer.model.eval()
        self._ask(model, "after")
        metrics = self._metrics(trainer)
        rows = history_rows(trainer.state.log_history)
        self._save_adapter(trainer)
        if self.samples:
            self._write(SAMPLES_FILE, json.dumps([sample.to_dict() for sample in self.samples], indent=1))
        self._write(HISTORY_FILE, to_jsonl(rows))
        self._write(REPORT_FILE, write_report(metrics, rows, self.samples, self.material.sentences))
        self._write(METRICS_FILE, json.dumps(metrics, indent=1, allow_nan=False) + "\n")
        self.folder.finish(self.asked)
        tokenizer = self.material.tokenizer
        return _result(self.folder.path, metrics, finished=True, model=model, tokenizer=tokenizer)

    def _write(self, name: str, content: str) -> None:
        replace_file(self.folder.path / name, content)

    def _save_adapter(self, trainer: FourbitTrainer) -> None:
        """Adapter and tokenizer, file by file under their names once all are written."""
        unfinished = self.folder.path / ".adapter.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        trainer.save_model(str(unfinished))
        for path in sorted(unfinished.iterdir()):
            path.replace(self.folder.path / path.name)
        unfinished.rmdir()

    def _metrics(self, trainer: FourbitTrainer) -> dict[str, Any]:
        from fourbit.train.planning import measured_parts
        from fourbit.train.progress import peak_bytes
        from fourbit.train.record import device_name, versions

        state, meter, config = trainer.state, trainer.meter, self.config
        scores = [row["eval_loss"] for row in state.log_history if "eval_loss" in row]
        asked = [row["eval_mmlu"] for row in state.log_history if "eval_mmlu" in row]
        checkpoint = self.folder.checkpoint
        return {
            "output": str(self.folder.path),
            "steps": state.global_step,
            "tokens": meter.tokens,
            "train_loss": meter.loss_sum / meter.logged_steps if meter.logged_steps else None,
            "eval_loss": scores[-1] if scores else None,
            "tokens_per_second": meter.tokens_per_second,
            "peak_bytes": peak_bytes(),
            **self.plan.metrics(measured_parts(trainer, peak_bytes(), self.bytes_before)),
            "resumed_from": None if checkpoint is None else checkpoints.step_of(checkpoint),
            "eval_loss_before": scores[0] if len(scores) > 1 and config.eval_on_start else None,
            "eval_mmlu": asked[-1] if asked else None,
            "epochs": state.epoch,
            "examples": len(self.material.train),
            "eval_examples": 0 if self.material.evaluation is None else len(self.material.evaluation),
            "dropped_records": self.material.dropped,
            "max_length": self.material.max_length,
            "trainable_parameters": self.trainable,
            "parameters": self.parameters,
            "training_seconds": meter.seconds,
            "seconds": time.perf_counter() - self.started,
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": device_name(),
            "seed": config.seed,
            "versions": versions(),
            "history": HISTORY_FILE,
            "report": REPORT_FILE,
            "config": config.to_full_dict(),
        }
