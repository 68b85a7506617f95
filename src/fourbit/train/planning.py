"""A run is planned before it loads anything, and its longest batch tried before its first step.

The plan is of what this process holds now and of what the run will add, with the rows as long as the data has them. A
run that would not fit is refused with the cheapest change that fits; `force` starts it all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourbit.errors import InputError
from fourbit.memory.advice import cheapest_change
from fourbit.memory.knobs import Knobs
from fourbit.memory.plan import PARTS, Plan, Planner
from fourbit.memory.process import WORKING_BYTES, resident_bytes
from fourbit.models.process import available_bytes
from fourbit.train.config import OURS_BY_NAME, USUAL_LENGTH, TrainConfig
from fourbit.words import size

if TYPE_CHECKING:
    from fourbit.train.material import Material
    from fourbit.train.trainer import FourbitTrainer

__all__ = ["RunPlan", "knobs_of", "machine_bytes", "measured_parts", "plan_run", "probe", "process_bytes"]

SOFTWARE_LIMIT = "/sys/fs/cgroup/memory.max"
"""What a container may use."""


@dataclass(frozen=True)
class RunPlan:
    """A plan, and what it is held against.

    Attributes:
        plan: None where a step of the model cannot be rehearsed.
        memory_bytes: what there is; None where nobody says.
        reason: why there is no plan.
    """

    plan: Plan | None
    memory_bytes: int | None
    reason: str | None = None

    @property
    def planned_bytes(self) -> int | None:
        """The peak as `peak_bytes` measures it."""
        return None if self.plan is None else self.plan.total_bytes

    @property
    def sentence(self) -> str:
        """For the log of the run."""
        if self.plan is None:
            return f"The memory of this run is not planned: {self.reason}"
        largest = sorted(self.plan.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{PARTS[name]} {size(count)}" for name, count in largest)
        of = "" if self.memory_bytes is None else f" of {size(self.memory_bytes)}"
        return f"Planned peak memory: {size(self.plan.needed_bytes)}{of} ({parts}, …)."

    def metrics(self, measured: dict[str, int]) -> dict[str, Any]:
        """What `metrics.json` has of it: by part, beside what was measured."""
        return {
            "planned_bytes": self.planned_bytes,
            "planned_parts": None if self.plan is None else dict(self.plan.parts),
            "measured_parts": measured,
        }


def knobs_of(config: TrainConfig, *, length: int | None = None, device: str | None = None) -> Knobs:
    """What a plan depends on, out of what a run is told.

    Args:
        length: tokens of the longest row, where they are known.
        device: "cpu" or "cuda"; by default what this machine has.
    """
    from fourbit.train.arguments import PACKED_MULTIPLE, multiple

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    length = length or config.max_length or USUAL_LENGTH
    grain = PACKED_MULTIPLE if config.packing else multiple(config.max_length or USUAL_LENGTH)
    targets = config.target_modules
    if isinstance(targets, str) and "," in targets:
        targets = [name.strip() for name in targets.split(",")]
    return Knobs(
        batch_size=config.per_device_train_batch_size,
        sequence_length=-(-length // grain) * grain,
        accumulation=config.gradient_accumulation_steps,
        rank=config.lora_r,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        dropout=config.lora_dropout,
        adapter_dtype=config.adapter_dtype,
        format=config.format,
        block_size=config.block_size,
        double_quant=config.double_quant,
        dtype=config.dtype,
        checkpointing="offload" if config.activation_offloading else config.gradient_checkpointing,
        packed=config.packing,
        device=device,
        **_optimizer_knobs(config, device),
    )


def _optimizer_knobs(config: TrainConfig, device: str) -> dict[str, Any]:
    from fourbit.train.optimizer import budgets

    bits = OURS_BY_NAME.get(config.optim)
    if bits is None:
        return {"optimizer": "adamw"}
    found = budgets(config, on_gpu=device == "cuda")
    budget = found["device_budget_bytes" if device == "cuda" else "host_budget_bytes"]
    return {
        "optimizer": f"paged_adamw_{bits}bit",
        "optimizer_budget_bytes": budget,
        "master_weights": config.optim_master_weights,
    }


def plan_run(config: TrainConfig, material: Material) -> RunPlan:
    """Plan a run with its data.

    Raises:
        InputError: it does not fit, and `config.force` is not set; names the cheapest change.
    """
    longest = max(map(len, material.rows["input_ids"]))
    knobs = knobs_of(config, length=min(longest, material.max_length))
    knobs = _within(knobs, material.max_length)
    memory = machine_bytes(config)
    try:
        planner = Planner(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
        plan = planner.plan(knobs)
    except InputError as error:
        return RunPlan(None, memory, str(error))
    found = RunPlan(_of_this_process(plan), memory)
    if memory is None or config.force or found.plan is None or found.plan.fits(memory):
        return found
    planner = Planner(
        config.model,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
        process_bytes=found.plan.parts["process"] - WORKING_BYTES if knobs.device == "cpu" else 0,
    )
    change = cheapest_change(planner, knobs, memory)
    hint = "no setting makes it fit; take a smaller model" if change is None else f"add `{change}`, which needs "
    hint += "" if change is None else size(change.plan.needed_bytes)
    raise InputError(
        f"This run needs {size(found.plan.needed_bytes)} of memory, and there are {size(memory)}: {hint}. (--force"
        " starts it all the same.)"
    )


def _within(knobs: Knobs, max_length: int) -> Knobs:
    """Rows are padded to a multiple, which may be a little more than the model was made for."""
    return knobs.with_(sequence_length=min(knobs.sequence_length, max_length)) if max_length > 1 else knobs


def _of_this_process(plan: Plan) -> Plan:
    """On a CPU, with what this process holds now, libraries of training and of planning included."""
    from dataclasses import replace

    if plan.knobs.device != "cpu":
        return plan
    held = resident_bytes() or plan.parts["process"] - WORKING_BYTES
    return replace(plan, parts={**plan.parts, "process": held + WORKING_BYTES})


def machine_bytes(config: TrainConfig | None = None) -> int | None:
    """What a run may hold: `memory`, if that is set, and no more than the machine has; None where nobody says."""
    asked = None if config is None else config.memory_bytes
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        from fourbit.memory.process import CONTEXT_BYTES

        there: int | None = free + CONTEXT_BYTES  # asking has made the context
    else:
        free_here = available_bytes()
        there = None if free_here is None else free_here + resident_bytes()
        limit = Path(SOFTWARE_LIMIT)
        if there is not None and limit.exists() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            there = min(there, int(text))
    return min((count for count in (asked, there) if count is not None), default=None)


def probe(trainer: FourbitTrainer, material: Material) -> str | None:
    """Run the longest batch forward and backward once, so that what does not fit shows now and not in the night.

    Nothing of it remains: gradients are dropped, and the random numbers are as before.

    Returns:
        None, or a sentence where it does not fit.
    """
    model, rows = trainer.model, material.rows
    batch_size = trainer.run_config.per_device_train_batch_size
    lengths = list(map(len, rows["input_ids"]))
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])[:batch_size]
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng():
            examples = trainer._remove_unused_columns(rows.select(order), "training")
            batch = trainer._prepare_inputs(trainer.data_collator(list(examples)))
            trainer.compute_loss(model, batch).backward()
    except (torch.OutOfMemoryError, MemoryError):
        return (
            f"The longest batch ({batch_size} × {lengths[order[0]]:,} tokens) does not fit into memory; a smaller"
            " `per_device_train_batch_size` with more `gradient_accumulation_steps` would."
        )
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        model.train(was_training)
    return None


def process_bytes() -> int:
    """What this process holds that is no part of the model; nothing of it counts on a GPU."""
    return 0 if torch.cuda.is_available() else resident_bytes()


def measured_parts(trainer: FourbitTrainer, peak_bytes: int, before_bytes: int) -> dict[str, int]:
    """What can be told apart of the peak.

    Args:
        peak_bytes: of the run.
        before_bytes: `process_bytes` before the model was loaded.

    Returns:
        as `PARTS`, with "step" for all that comes and goes: gradients, activations, logits, workspace and slack.
    """
    from fourbit.nn import QuantLinear

    found = dict.fromkeys(("weights_4bit", "scales", "weights_16bit", "adapters", "optimizer"), 0)
    seen = set[int]()
    for module in trainer.model.modules():
        if isinstance(module, QuantLinear):
            scales = (module.absmax, module.nested_absmax, module.nested_offset)
            found["scales"] += sum(part.nbytes for part in scales if part is not None)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                four_bits = isinstance(module, QuantLinear) and tensor is module.weight
                name = "weights_4bit" if four_bits else "adapters" if tensor.requires_grad else "weights_16bit"
                found[name] += tensor.nbytes
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    paged = getattr(optimizer, "size_bytes", None)
    states = getattr(optimizer, "state", {}).values()
    plain = sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))
    found["optimizer"] = paged if isinstance(paged, int) else plain
    found["process"] = before_bytes
    found["step"] = max(0, peak_bytes - sum(found.values()))
    return found
