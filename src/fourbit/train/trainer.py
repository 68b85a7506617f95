"""trl's `SFTTrainer`, with our loss, our checkpoints and our clock.

What is kept of it: batches and their collator, packing, accumulation, schedules, clipping, several processes, trackers,
every option of `SFTConfig`. What is replaced, and why:

- the loss: `SFTTrainer` recomputes the logits in the backward pass and scores masked positions too. Ours is the chunked
  one that `fourbit.prepare` put into the model;
- evaluation: the mean is over labelled tokens, not over batches, and it draws nothing from the random numbers of the
  training, so that evaluating more or less often changes no result;
- the order of the examples: it depends on the seed and the epoch alone, so that a resumed run goes on with the same;
- saving: a checkpoint is whole or not there;
- trouble: a batch that does not fit into memory is done in pieces, and a step without numbers is left out (`guarded`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from fourbit.models.folders import disk_problem, name_disk_problem
from fourbit.nn.loss import IGNORE
from fourbit.train import checkpoints
from fourbit.train.arguments import arguments
from fourbit.train.config import TrainConfig
from fourbit.train.events import Evaluated, OnEvent, Said, Saved, Stepped
from fourbit.train.guard import GUARD_FILE
from fourbit.train.guarded import GuardedTrainer
from fourbit.train.interrupt import Stop
from fourbit.train.optimizer import optimizer
from fourbit.train.order import EpochSampler
from fourbit.train.progress import Meter, memory_bytes, peak_bytes
from fourbit.train.rescue import RESCUE_FILE

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = ["FourbitTrainer", "scoring"]

METER_FILE = "meter.json"


class FourbitTrainer(GuardedTrainer):
    """See the top of this file.

    Args:
        model: prepared, with an adapter.
        config: of the run.
        train_data, eval_data: tokenized, with labels; packed if `config.packing`.
        stop: asked after every step.
        on_event: is told of steps, evaluations, checkpoints and trouble.
        places: where rows of `train_data` came from, for people; by default their numbers.
    """

    loss_is_scaled_for_ga = True
    control: TrainerControl

    def __init__(
        self,
        model: PeftModel,
        *,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        train_data: Dataset,
        eval_data: Dataset | None,
        stop: Stop,
        on_event: OnEvent,
        places: Callable[[Sequence[int]], list[str]] | None = None,
    ) -> None:
        from fourbit.train.callback import RunCallback

        self.run_config, self.stop, self.on_event, self.meter = config, stop, on_event, Meter()
        self.prepare_for_trouble(model, config, places)
        causal_lm = model.get_base_model()
        own_forward = causal_lm.__dict__.get("forward")
        super().__init__(
            model=model,
            args=arguments(config, evaluates=eval_data is not None),
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            callbacks=[RunCallback(self)],
            optimizer_cls_and_kwargs=optimizer(config),
        )
        # trl has put its own loss in front of the model's forward pass.
        if own_forward is None:
            causal_lm.__dict__.pop("forward", None)
        else:
            causal_lm.forward = own_forward
        self.model_accepts_loss_kwargs = True  # the number of labels is counted over the whole step
        self.remove_callback(PrinterCallback)

    # The order of the examples

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        grouped = self.run_config.group_by_length and not self.run_config.packing
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        return EpochSampler(
            [len(ids) for ids in data["input_ids"]],
            group_size=size if grouped and size < len(data) else None,
            seed=self.args.data_seed,
        )

    # The clock

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Also starts the clock of the step."""
        self.meter.start_clock()
        self._step_loss = None
        batches, labelled = super().get_batch_samples(*args, **kwargs)
        self.meter.start_step(sum(_tokens(batch) for batch in batches))
        return batches, labelled

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it walks through all parameters for each batch."""
        return 0

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, which `fourbit.prepare` made the chunked one.

        A model gives the mean over the labels of its batch. A step is the mean over the labels of all its batches, on
        all devices, so that it does not depend on how it is cut into them.
        """
        outputs = model(**self._given(inputs))
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            loss = loss * _labelled(inputs["labels"]) / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        self.rescue.check(loss)
        return (loss, outputs) if return_outputs else loss

    def _given(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model is called with: no cache, and no mask of the padding.

        Padding stands on the right, where a causal model does not look, and its labels do not count. Without a mask
        attention takes its faster causal path. Only the balance of experts looks at all tokens.
        """
        kept = {**inputs, "use_cache": False}
        if not getattr(self.model.config.get_text_config(), "output_router_logits", False):
            kept.pop("attention_mask", None)
        return kept

    # Evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The mean loss per labelled token."""
        started, step = time.perf_counter(), self.state.global_step
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.random.fork_rng(), scoring(self.model), torch.no_grad():
            loader = self.get_eval_dataloader(eval_dataset)
            for done, batch in enumerate(loader, 1):
                inputs = self._prepare_inputs(batch)
                sums += self.rescue.evaluate(inputs, self._score)
                self.on_event(Evaluated(step, done, len(loader), None))
                if self.stop.requested and self.args.metric_for_best_model is None:
                    self._end_soon()
                    return {}
        total, labelled = self.accelerator.reduce(sums, reduction="sum").tolist()
        loss = total / labelled
        runtime = {f"{metric_key_prefix}_runtime": time.perf_counter() - started}
        if not math.isfinite(loss):
            self._note("no_score", f"The evaluation after step {step} has no score: its loss is {loss}.")
            self.log(runtime)
            return {f"{metric_key_prefix}_loss": math.inf, **runtime}
        metrics = {f"{metric_key_prefix}_loss": loss, **runtime}
        self.log(metrics)
        self.on_event(Evaluated(step, len(loader), len(loader), loss))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def weights_are_good(self) -> bool:
        """Whether they still give a number for the records of the last good step, from before the change it made."""
        if self.guard.last_good is None:
            return False
        batch = self.data_collator([self.train_dataset[row] for row in self._rows_of(self.guard.last_good)])
        with scoring(self.model), torch.no_grad():
            found = self.rescue.evaluate(self._prepare_inputs(batch), self._score)
        return bool(found.isfinite().all())

    def _score(self, inputs: Mapping[str, Any]) -> Tensor:
        """[2] float64: the sum of the losses of a batch, and how many there are."""
        labelled = _labelled(inputs["labels"]).double()
        return torch.stack([self.model(**self._given(inputs))["loss"].double() * labelled, labelled])

    # The log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what is measured here, and tell whoever listens."""
        if "loss" in logs:
            step, last = self.state.global_step, self.last_logged
            logs = {name: value for name, value in logs.items() if math.isfinite(value)}  # the norm, if left out
            scored = self.meter.logged_steps - self._scored_before
            self._scored_before, self.last_logged = self.meter.logged_steps, step
            logs |= {"tokens": self.meter.tokens, "seconds": self.meter.seconds}
            logs |= {"memory_bytes": memory_bytes(), "peak_bytes": peak_bytes()}
            rate = self.meter.tokens_per_second
            if rate is not None:
                logs["tokens_per_second"] = rate
            if scored:  # the mean is over all steps since the last log, those included that have no loss
                logs["loss"] *= (step - last) / scored
                self.meter.loss_sum += logs["loss"] * scored
                self.on_event(self._stepped(logs))
            else:
                del logs["loss"]
        Trainer.log(self, logs, start_time)  # SFTTrainer would add metrics of its own loss
        if self.stop.requested:
            self._end_soon()

    def _end_soon(self) -> None:
        """Save and end once this step is complete."""
        self.control.should_training_stop = self.control.should_save = True
        self.control.should_evaluate = False

    last_logged = 0
    _scored_before = 0

    def _stepped(self, logs: dict[str, float]) -> Stepped:
        step, steps = self.state.global_step, self.state.max_steps
        return Stepped(
            step=step,
            steps=steps,
            epoch=float(self.state.epoch or 0),
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens=self.meter.tokens,
            tokens_per_second=self.meter.tokens_per_second,
            memory_bytes=int(logs["memory_bytes"]),
            seconds_left=self.meter.seconds_left(steps - step),
        )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output = Path(self.args.output_dir)
        step = self.state.global_step
        final = output / f"checkpoint-{step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with checkpoints.writing(final) as unfinished:
                self._write_checkpoint(model, trial, unfinished, final)
        except OSError as error:
            if disk_problem(error) is None or self.stop.requested:
                raise
            why = f"The checkpoint after step {step} could not be written: {name_disk_problem(error)}."
            self.on_event(Said(f"{why} The run goes on, and tries again at the next one."))
            return
        finally:
            self.args.output_dir, self.args.save_total_limit = str(output), limit
        checkpoints.forget_old(final, keep=limit, best=self.state.best_model_checkpoint)
        self.on_event(Saved(step, final))

    def _write_checkpoint(self, model: nn.Module, trial: Any, unfinished: Path, final: Path) -> None:
        self.args.output_dir = str(unfinished)
        Trainer._save_checkpoint(self, model, trial)  # SFTTrainer would write a model card as well
        written = unfinished / final.name
        if self.state.best_global_step is not None:  # it was looked for in the unfinished folder
            self.state.best_model_checkpoint = str(final.with_name(f"checkpoint-{self.state.best_global_step}"))
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        self.meter.save(written / METER_FILE)
        self.guard.save(written / GUARD_FILE)
        self.rescue.save(written / RESCUE_FILE)
        for path in written.iterdir():
            path.rename(unfinished / path.name)
        written.rmdir()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The adapter; neither a pickle of the arguments, nor a model card with nothing in it."""
        folder = Path(output_dir or self.args.output_dir)
        self.model.save_pretrained(str(folder), state_dict=state_dict)
        (folder / "README.md").unlink(missing_ok=True)
        self.processing_class.save_pretrained(str(folder))

    def take_up(self, checkpoint: Path) -> None:
        """Go on counting where the run stood at a checkpoint; `train(resume_from_checkpoint=...)` does the rest."""
        self.meter = Meter.load(checkpoint / METER_FILE)
        self.last_logged, self._scored_before = checkpoints.step_of(checkpoint), self.meter.logged_steps
        self.guard.load(checkpoint / GUARD_FILE)
        self.rescue.load(checkpoint / RESCUE_FILE)
        self.args.eval_on_start = False
        # It may have been killed after it had written this one and before it had deleted the old ones.
        best = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).best_model_checkpoint
        checkpoints.forget_old(checkpoint, keep=self.args.save_total_limit, best=best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """In the dtype that the adapter has: peft would make one in 16 bits fp32, and the run another from here on."""
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def restore(self, checkpoint: Path) -> None:
        """Take the adapter and the history of a checkpoint, and train no further."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def _labelled(labels: Tensor) -> Tensor:
    """How many tokens of a batch are predicted and count."""
    return (labels[..., 1:] != IGNORE).sum()


def _tokens(batch: dict[str, Tensor]) -> int:
    """The tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    positions = batch["position_ids"][0]  # packed: a 0 before a 1 begins an example, any other 0 is padding
    later = positions > 0
    return int(later.sum() + (later[1:] & ~later[:-1]).sum())


@contextmanager
def scoring(model: Any) -> Iterator[None]:
    """Evaluation mode, but without the logits ever existing whole.

    The chunked loss is taken in training mode only, as whoever evaluates usually wants logits. So the outermost module,
    which has no dropout of its own, is told that it trains.
    """
    was_training = model.training
    model.eval()
    outermost = model.get_base_model()
    outermost.training = True
    try:
        yield
    finally:
        outermost.training = False
        model.train(was_training)
