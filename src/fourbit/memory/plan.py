"""`fourbit.plan`: what finetuning a model will hold at its peak, part by part, before anything is allocated."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fourbit.errors import InputError
from fourbit.memory.knobs import Knobs
from fourbit.memory.process import CONTEXT_BYTES, WORKING_BYTES, baseline_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from fourbit.memory.blueprint import Blueprint
    from fourbit.memory.rehearsal import Peak

__all__ = ["PARTS", "Plan", "Planner", "plan"]

PARTS = {
    "weights_4bit": "4-bit weights",
    "scales": "their scales",
    "weights_16bit": "16-bit parts",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "logits",
    "workspace": "workspace",
    "slack": "allocator slack",
    "process": "Python and libraries",
}
"""The parts of a plan -> what people call them."""

CUBLAS_BYTES = 32 << 20
"""cuBLAS's workspace on Hopper, which it takes from torch's allocator; 8 MiB on older cards."""

ROUNDING = 0.01
"""A hundredth of what is allocated on a GPU: blocks that are a little larger than what lies in them."""

FRAGMENTS = 0.03
"""What torch's allocator on a GPU holds beyond what is allocated: pieces too small for the next tensor."""

PAGE_ELEMENTS = 1 << 20
"""Of a page of the paged optimizer: its scratch for parameters in 16 bits takes 8 bytes for each."""

THIN_LAYERS = (4, 6)
"""Layers of the shallow models that the memory of deep ones is extrapolated from."""

STATE_BYTES = {"paged_adamw_32bit": 8.0, "paged_adamw_8bit": 2.03}
"""Of one parameter."""


@dataclass(frozen=True)
class Plan:
    """The peak of a run.

    Attributes:
        model: its name.
        knobs: how it is trained.
        parts: name (see `PARTS`) -> bytes held at the peak. On a GPU, bytes of torch's allocator; on a CPU, of the
            process's resident size.
        context_bytes: what the driver of a GPU takes for itself; 0 on a CPU.
        host_bytes: pinned memory of the host that activations or states were moved to; 0 on a CPU.
        parameters, trainable: of the model with its adapter.
        longest: tokens the model was made for; None where it does not say.
        operation: what runs at the peak.
    """

    model: str
    knobs: Knobs
    parts: Mapping[str, int]
    context_bytes: int
    host_bytes: int
    parameters: int
    trainable: int
    longest: int | None
    operation: str

    @property
    def total_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """What the device must have: on a GPU also the context, and what the allocator cannot fill."""
        if self.knobs.device == "cpu":
            return self.total_bytes
        return round(self.total_bytes * (1 + FRAGMENTS)) + self.context_bytes

    def fits(self, bytes: int) -> bool:
        """Whether a device with so much memory is enough."""
        return self.needed_bytes <= bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "model": self.model,
            "device": self.knobs.device,
            "total_bytes": self.total_bytes,
            "needed_bytes": self.needed_bytes,
            "context_bytes": self.context_bytes,
            "host_bytes": self.host_bytes,
            "parts": dict(self.parts),
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "knobs": self.knobs.to_dict(),
        }


class Planner:
    """Plans of one model under many knobs; what two plans share is done once.

    Args:
        model: see `plan`.
        process_bytes: see `plan`.

    Raises:
        NotAModel, BrokenCheckpoint, InputError: see `plan`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedConfig,
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        process_bytes: int | None = None,
    ) -> None:
        # Before what only a plan imports, which a run would not.
        self.process_bytes = baseline_bytes() if process_bytes is None else process_bytes
        from fourbit.memory.blueprint import read_model_config

        self._config, self._folder = read_model_config(model, trust_remote_code=trust_remote_code, revision=revision)
        self._trust_remote_code = trust_remote_code
        self.name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else str(self._folder)
        self._blueprints: dict[Knobs, Blueprint] = {}
        self._plans: dict[Knobs, Plan] = {}
        self._thinner: dict[int, Planner] = {}

    @property
    def longest(self) -> int | None:
        """Tokens the model was made for; None where its configuration does not say."""
        longest = getattr(self._config.get_text_config(decoder=True), "max_position_embeddings", None)
        return longest if isinstance(longest, int) and longest > 0 else None

    def plan(self, knobs: Knobs) -> Plan:
        """See `plan`."""
        if knobs not in self._plans:
            self._plans[knobs] = self._make(knobs)
        return self._plans[knobs]

    def estimate(self, knobs: Knobs) -> int:
        """About the `needed_bytes` of a plan, sooner: of a deep model, on the line through two shallow ones."""
        text = self._config.get_text_config(decoder=True)
        layers = getattr(text, "num_hidden_layers", 0)
        if layers < 2 * THIN_LAYERS[1] or len(set(getattr(text, "layer_types", None) or ())) > 1:
            return self.plan(knobs).needed_bytes
        few, more = (self._thin(count).plan(knobs.with_(optimizer="none")) for count in THIN_LAYERS)
        times = (layers - THIN_LAYERS[0]) / (THIN_LAYERS[1] - THIN_LAYERS[0])
        needed = few.needed_bytes + times * (more.needed_bytes - few.needed_bytes)
        adapters = few.parts["adapters"] + times * (more.parts["adapters"] - few.parts["adapters"])
        trainable = few.trainable + times * (more.trainable - few.trainable)
        states, _ = _states(round(adapters), round(trainable), knobs)  # a budget is not on a line
        return round(needed + states * (1 + FRAGMENTS if knobs.device == "cuda" else 1))

    def _thin(self, layers: int) -> Planner:
        """The planner of a model of the first few layers."""
        if layers not in self._thinner:
            thin = copy.copy(self)
            thin._config, thin._blueprints, thin._plans = copy.deepcopy(self._config), {}, {}
            text = thin._config.get_text_config(decoder=True)
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:layers]
            text.num_hidden_layers = layers
            self._thinner[layers] = thin
        return self._thinner[layers]

    def _make(self, knobs: Knobs) -> Plan:
        from fourbit.memory.rehearsal import rehearse

        blueprint = self._blueprint(knobs)
        longest = self.longest
        if longest is not None and knobs.sequence_length > longest:
            raise InputError(
                f"`sequence_length` is {knobs.sequence_length}, and {self.name} was made for {longest} tokens; give"
                f" {longest} or less."
            )
        peak = rehearse(blueprint, knobs)
        weights = blueprint.weights
        states, elsewhere = _states(weights.adapters, weights.trainable, knobs)
        parts = self._parts(blueprint, peak, states, knobs)
        on_gpu = knobs.device == "cuda"
        return Plan(
            model=self.name,
            knobs=knobs,
            parts={name: parts.get(name, 0) for name in PARTS},
            context_bytes=CONTEXT_BYTES if on_gpu else 0,
            host_bytes=peak.host + elsewhere if on_gpu else 0,
            parameters=weights.parameters,
            trainable=weights.trainable,
            longest=longest,
            operation=peak.operation,
        )

    def _blueprint(self, knobs: Knobs) -> Blueprint:
        """The model under these knobs; some of them do not change it."""
        from fourbit.memory.blueprint import draw

        key = knobs.with_(
            batch_size=1,
            sequence_length=1,
            packed=False,
            accumulation=1,
            optimizer="none",
            optimizer_budget_bytes=None,
            master_weights=False,
            device="cpu",
        )
        if key not in self._blueprints:
            config = copy.deepcopy(self._config)
            self._blueprints[key] = draw(config, self._folder, knobs, trust_remote_code=self._trust_remote_code)
        return self._blueprints[key]

    def _parts(self, blueprint: Blueprint, peak: Peak, states: int, knobs: Knobs) -> dict[str, int]:
        weights = blueprint.weights
        parts = {
            "weights_4bit": weights.codes,
            "scales": weights.scales,
            "weights_16bit": weights.others,
            "adapters": weights.adapters,
            "gradients": peak.gradients,
            "optimizer": states,
            "activations": peak.activations + (knobs.tokens**2 if knobs.packed else 0),  # one byte of mask a pair
            "logits": peak.logits,
            "workspace": peak.workspace,
        }
        if knobs.device == "cuda":
            # The step of the optimizer holds all gradients and its scratch, and no activations.
            short = weights.adapters + _scratch(knobs) - peak.total
            return parts | {"slack": round(CUBLAS_BYTES + ROUNDING * sum(parts.values())) + max(0, short)}
        from fourbit.memory.heap import high_water

        each = [2 * one.nbytes for one in blueprint.model.parameters() if one.requires_grad]
        factor = states / sum(each) if sum(each) else 0
        grown = high_water(peak.step, passes=knobs.accumulation, states=[round(size * factor) for size in each])
        slack = max(0, grown + _scratch(knobs) - peak.total - states)
        return parts | {"slack": slack, "process": self.process_bytes + WORKING_BYTES}


def _states(adapter_bytes: int, trainable: int, knobs: Knobs) -> tuple[int, int]:
    """Bytes of the optimizer's states on the device, and elsewhere."""
    if knobs.optimizer == "none":
        return 0, 0
    if knobs.optimizer == "adamw":
        return 2 * adapter_bytes, 0
    states = round((STATE_BYTES[knobs.optimizer] + (4 if knobs.master_weights else 0)) * trainable)
    budget = states if knobs.optimizer_budget_bytes is None else min(states, knobs.optimizer_budget_bytes)
    return budget, states - budget


def _scratch(knobs: Knobs) -> int:
    return 8 * PAGE_ELEMENTS if knobs.optimizer in STATE_BYTES and knobs.adapter_dtype != "float32" else 0


def plan(
    config_or_path: str | os.PathLike[str] | PreTrainedConfig,
    batch_size: int = 1,
    sequence_length: int = 512,
    rank: int = 64,
    *,
    packed: bool = False,
    accumulation: int = 1,
    target_modules: str | Sequence[str] = "all-linear",
    dropout: float = 0.0,
    adapter_dtype: str = "float32",
    format: str | None = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    dtype: str = "bfloat16",
    checkpointing: bool | Literal["offload"] = True,
    optimizer: str = "adamw",
    optimizer_budget_bytes: int | None = None,
    master_weights: bool = False,
    vocabulary: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    process_bytes: int | None = None,
) -> Plan:
    """Tell what finetuning will hold at its peak. No weight is read: a step is rehearsed with tensors without memory.

    Args:
        config_or_path: a model folder, its config.json, a name on the hub (config.json alone is downloaded), a shape of
            `models.shapes` such as "llama-7b", or a configuration of transformers.
        batch_size, sequence_length, rank, and all up to `vocabulary`: see `Knobs`.
        device: "cpu" or "cuda"; by default what this machine has.
        trust_remote_code, revision: see `fourbit.load`.
        process_bytes: what Python and its libraries take on a CPU; None measures this process, which is the one that
            will train.

    Returns:
        the plan: `.total_bytes`, `.parts`, `.fits(bytes)`.

    Error: on a CPU within 10% of the peak resident size (benchmarks/plan_cpu.py). On a GPU counted to be within 3% of
    `max_memory_allocated` and not below (benchmarks/plan_gpu.py).

    Raises:
        NotAModel, BrokenCheckpoint: there is no such model. InputError: a value that makes no sense, or a model of
        which a step cannot be rehearsed.
    """
    import torch

    knobs = Knobs(
        batch_size=batch_size,
        sequence_length=sequence_length,
        packed=packed,
        accumulation=accumulation,
        rank=rank,
        target_modules=target_modules if isinstance(target_modules, str) else tuple(target_modules),
        dropout=dropout,
        adapter_dtype=adapter_dtype,
        format=format,
        block_size=block_size,
        double_quant=double_quant,
        dtype=dtype,
        checkpointing=checkpointing,
        optimizer=optimizer,
        optimizer_budget_bytes=optimizer_budget_bytes,
        master_weights=master_weights,
        vocabulary=vocabulary,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    planner = Planner(
        config_or_path, trust_remote_code=trust_remote_code, revision=revision, process_bytes=process_bytes
    )
    return planner.plan(knobs)
