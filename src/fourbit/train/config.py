"""What a training run is told: one dataclass, the same as YAML file, as `key=value` and as Python arguments.

Keys keep the names that transformers and trl gave them; ours stand beside them. What is not a field here may still be
any field of trl's `SFTConfig`; it is checked against that class and handed on in `extra`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from fourbit.errors import InputError
from fourbit.quant.config import COMPUTE_DTYPES, QuantConfig, chosen_config
from fourbit.train import values
from fourbit.words import parse_size

__all__ = ["USUAL_LENGTH", "TrainConfig"]

USUAL_LENGTH = 512
"""Tokens of an example at most, unless the config or the model says otherwise."""

MOST_SEED = 2**32 - 1
"""numpy takes no larger one."""

LOSS_ON = ("answers", "all")
OLD_NAMES = {"warmup_ratio": "warmup_steps", "evaluation_strategy": "eval_strategy"}
"""Names that many recipes still carry, and the ones that transformers has now; the values mean the same."""

OURS_INSTEAD = {
    "activation_checkpointing": "gradient_checkpointing",
    "assistant_only_loss": "loss_on",
    "bf16": "dtype",
    "chat_template_path": "chat_template",
    "completion_only_loss": "loss_on",
    "fp16": "dtype",
    "output_dir": "output",
    "resume_from_checkpoint": "--resume",
    "train_sampling_strategy": "group_by_length",
}
"""Fields of `SFTConfig` that would contradict one of ours."""

NOT_POSSIBLE = {
    "auto_find_batch_size": "a batch that does not fit into memory is done in pieces anyway",
    "dataset_kwargs": "the data is prepared by fourbit",
    "deepspeed": "a run takes one process and one GPU",
    "dataset_text_field": "the fields of the data are recognised",
    "eos_token": "the end of an answer comes from the chat template",
    "eval_packing": "the evaluation data is packed when the training data is",
    "fsdp": "a run takes one process and one GPU",
    "fsdp_config": "a run takes one process and one GPU",
    "label_smoothing_factor": "the loss is computed without the logits",
    "loss_type": "the loss is the cross-entropy of the next token",
    "model_init_kwargs": "the model is loaded by fourbit",
    "pad_token": "padding is masked by its position, so the tokenizer's own token serves",
    "padding_free": "packing does that",
    "push_to_hub": "`hf upload` takes the output folder when the run has ended",
    "shuffle_dataset": "the data is shuffled anyway, by data_seed",
    "use_liger_kernel": "the kernels are fourbit's own",
}
"""Fields of `SFTConfig` that have no meaning here, and why."""


OURS_BY_NAME = {"adamw_8bit": 8, "paged_adamw": 32, "paged_adamw_32bit": 32, "paged_adamw_8bit": 8}
"""transformers' names, where they mean bitsandbytes', for `fourbit.optim.PagedAdamW`, and the bits of its states."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a run depends on. The defaults are Guanaco's, and three passes over the data.

    Attributes:
        model: a model folder or hub name, in 16 or in 4 bits.
        data: a file, a folder of files, or a hub name.
        output: the folder to write.
        eval_data: data to evaluate on; by default a share of `data` is held out.
        split: the split of a hub data set.
        limit: take the first so many records.
        eval_size: examples to hold out: a number, or a share below 1; 0 for no evaluation.
        loss_on: `answers`, or `all` for every token.
        chat_template: the name of a template, or a Jinja file; by default the tokenizer's own, or Guanaco's if it has
            none.
        revision, trust_remote_code: of the model; see `fourbit.load`.
        format, block_size, double_quant: how a model in 16 bits is quantized: NF4, 64 and yes; `none` leaves it.
        dtype: what is computed in; where the machine cannot train in it, a sentence says what is used instead.
        adapter: an adapter to train on, in place of a new one.
        adapter_dtype: what its parameters are kept in.
        lora_r, lora_alpha, lora_dropout, target_modules: the new adapter; see peft's `LoraConfig`.
        max_length: tokens of an example; longer ones are cut. By default 512, or the model's length if that is less.
        packing: put several examples into one row; they do not see each other.
        gradient_checkpointing: compute activations again in the backward pass in place of keeping them.
        activation_offloading: move what checkpointing keeps to the host's memory; without a GPU it is there anyway.
        memory: what the run may use, such as 24GB; by default all that the machine has. A step that would need more is
            done in smaller pieces.
        force: start a run that is planned not to fit all the same.
        group_by_length: put examples of about one length into a batch.
        eval_steps, save_steps, logging_steps, warmup_steps: steps, or a share of all steps if below 1.
        optim: transformers' name of an optimizer; `paged_adamw_32bit`, `paged_adamw_8bit` and `adamw_8bit` are ours.
        optim_device_budget: what pages of its state may take on a GPU, "2GB" say; 256 MiB where the name says paged.
        optim_host_budget: what they may take in the host's memory; the others are in a file.
        optim_folder: where that file is; by default in `output`.
        optim_page_elements: of a page; by default 2^20, or what is a quarter of a budget.
        optim_master_weights: keep fp32 copies of bf16 adapters among the pages.
        max_skipped_steps: steps without a number for a loss or gradient; so many in a row end the run.
        mmlu: MMLU's questions, as a folder, file or hub name, to be asked at every evaluation; see `fourbit eval mmlu`.
        mmlu_shots, mmlu_limit: worked examples before each of them, and questions of each subject.
        samples: questions that the model is asked before and after, for the report.
        sample_tokens: the longest answer to one.
        extra: further fields of trl's `SFTConfig`.

    The others are those of transformers' `TrainingArguments`.

    Raises:
        InputError: a value that makes no sense; names the key.
    """

    model: str
    data: str
    output: str
    eval_data: str | None = None
    split: str | None = None
    limit: int | None = None
    eval_size: float | None = None
    loss_on: str = "answers"
    chat_template: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    format: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: str = "bfloat16"

    adapter: str | None = None
    adapter_dtype: str = "float32"
    lora_r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.1
    target_modules: str | list[str] = "all-linear"

    max_length: int | None = None
    packing: bool = False
    group_by_length: bool = True
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    gradient_checkpointing: bool = True
    activation_offloading: bool = False
    memory: str | None = None
    force: bool = False

    max_steps: int = -1
    num_train_epochs: float = 3.0
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 0.03
    optim: str = "adamw_torch_fused"
    optim_device_budget: int | str | None = None
    optim_host_budget: int | str | None = None
    optim_folder: str | None = None
    optim_page_elements: int | None = None
    optim_master_weights: bool = False
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    max_skipped_steps: int = 5
    seed: int = 0
    data_seed: int = 42

    eval_steps: float = 0.25
    eval_on_start: bool = True
    save_steps: float = 100
    save_total_limit: int | None = 2
    logging_steps: float = 1
    report_to: str | list[str] = "none"
    mmlu: str | None = None
    mmlu_shots: int = 5
    mmlu_limit: int | None = None
    samples: int = 3
    sample_tokens: int = 48
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = values.coerce(getattr(self, item.name), _hints()[item.name], item.name)
            object.__setattr__(self, item.name, value)
        self._check_words()
        self._check_ranges()
        self._check_optimizer()
        self.quantization()
        _ = self.memory_bytes

    def _check_words(self) -> None:
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise InputError(f"`{name}` is empty; give {_MEANING[name]}.")
        values.one_of("loss_on", self.loss_on, LOSS_ON)
        values.one_of("dtype", self.dtype, COMPUTE_DTYPES)
        values.one_of("adapter_dtype", self.adapter_dtype, ("float32", "bfloat16"))

    def _check_ranges(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"`{name}` is {value}; it must be {least} or more.")
        for name in ("seed", "data_seed"):
            if getattr(self, name) > MOST_SEED:
                raise InputError(f"`{name}` is {getattr(self, name)}; it must be {MOST_SEED} at most.")
        for name in ("learning_rate", "num_train_epochs", "lora_alpha", "save_steps", "logging_steps", "eval_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"`{name}` is {getattr(self, name)}; it must be above 0.")
        for name in ("lora_dropout", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"`{name}` is {getattr(self, name)}; it must be from 0 to below 1.")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise InputError(
                "`activation_offloading` moves what checkpointing keeps; set `gradient_checkpointing`, too."
            )
        if self.eval_data is not None and self.eval_size is not None:
            raise InputError(
                "`eval_size` takes a part of `data`; with `eval_data`, all of which is taken, leave it out."
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise InputError(f"`max_steps` is {self.max_steps}; it must be 1 or more, or -1 for num_train_epochs.")

    def _check_optimizer(self) -> None:
        given = [name for name in _OPTIM_KEYS if getattr(self, name) not in (None, False)]
        if self.optim not in OURS_BY_NAME:
            if given:
                raise InputError(
                    f"`{given[0]}` is for an optimizer with pages, and `optim` is {self.optim}; set it to"
                    " paged_adamw_32bit or paged_adamw_8bit."
                )
            return
        if self.extra.get("optim_args"):
            raise InputError(f"`optim_args` means nothing to {self.optim}; leave it out.")
        if self.optim_master_weights and self.adapter_dtype == "float32":
            raise InputError("`optim_master_weights` is for adapters in 16 bits; set `adapter_dtype` to bfloat16.")
        for name in ("optim_device_budget", "optim_host_budget"):
            if getattr(self, name) is not None:
                parse_size(getattr(self, name), f"`{name}`")
        if self.optim_folder is not None and self.optim_host_budget is None:
            raise InputError("`optim_folder` is for the pages beyond `optim_host_budget`; give that, too.")

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number.

        Raises:
            InputError: it is no size.
        """
        return None if self.memory is None else parse_size(self.memory, "`memory`")

    def quantization(self) -> QuantConfig | None:
        """How the model is to be quantized; None where it says for itself, or is left in 16 bits.

        Raises:
            InputError: the three keys contradict each other or make no sense.
        """
        return chosen_config(self.format, self.block_size, self.double_quant)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any], *, source: str = "The configuration") -> TrainConfig:
        """A config of keys and values as they stand in a YAML file.

        Args:
            given: key -> value; a number may be a string.
            source: what messages call the place where it comes from.

        Raises:
            InputError: an unknown key (with the nearest valid one), a missing one, or a value that makes no sense.
        """
        own: dict[str, Any] = {}
        extra: dict[str, Any] = dict(values.coerce(given.get("extra") or {}, dict[str, Any], "extra"))
        for key, value in _by_new_names(given, source).items():
            if key in _NAMES:
                own[key] = value
            elif key != "extra":
                extra[key] = value
        if extra:
            extra = _check_extra(extra, source)
        for name in _REQUIRED:
            if own.get(name) is None:
                raise InputError(f"{source} says nothing of `{name}`; give {_MEANING[name]}.")
        return cls(**own, extra=extra)

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """Read a YAML file.

        Args:
            overrides: keys that win over the file's.

        Raises:
            InputError: it is no such file, no YAML, or `from_mapping` refuses it.
        """
        source = os.fspath(path)
        from_file = _by_new_names(values.read_yaml(Path(path)), source)
        return cls.from_mapping({**from_file, **_by_new_names(overrides or {}, "The command")}, source=source)

    def to_dict(self) -> dict[str, Any]:
        """Every key that differs from its default, in their order: what `to_yaml` writes."""
        given = {}
        for item in fields(self):
            value = getattr(self, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name != "extra" and value != default:
                given[item.name] = value
        return {**given, **self.extra}

    def to_full_dict(self) -> dict[str, Any]:
        """Every key, defaults included."""
        whole = asdict(self)
        return {**{name: value for name, value in whole.items() if name != "extra"}, **self.extra}

    def to_yaml(self) -> str:
        """The text of a YAML file that gives this config again."""
        return values.write_yaml(self.to_dict())

    def with_(self, **changes: Any) -> TrainConfig:
        """The same with some keys changed."""
        return replace(self, **changes)


def _hints() -> dict[str, Any]:
    global _HINTS
    if _HINTS is None:
        _HINTS = get_type_hints(TrainConfig)
    return _HINTS


_HINTS: dict[str, Any] | None = None
_NAMES = tuple(item.name for item in fields(TrainConfig) if item.name != "extra")
_REQUIRED = ("model", "data", "output")
_MEANING = {
    "model": "a model folder or a name on the hub",
    "data": "a file, a folder or a name on the hub",
    "output": "the folder to write",
}
_OPTIM_KEYS = (
    "optim_device_budget",
    "optim_host_budget",
    "optim_folder",
    "optim_page_elements",
    "optim_master_weights",
)
_AT_LEAST = {
    "limit": 1,
    "eval_size": 0,
    "lora_r": 1,
    "max_length": 2,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "max_skipped_steps": 1,
    "mmlu_limit": 1,
    "mmlu_shots": 0,
    "seed": 0,
    "data_seed": 0,
    "optim_page_elements": 64,
    "save_total_limit": 1,
    "samples": 0,
    "sample_tokens": 1,
}


def _by_new_names(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    for old, new in OLD_NAMES.items():
        if old in given and new in given:
            raise InputError(f"{source} has both `{old}` and `{new}`, which mean the same; keep one.")
    return {OLD_NAMES.get(key, key): value for key, value in given.items()}


def _check_extra(extra: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The keys that are trl's alone, each with a value of its type."""
    known = values.sft_fields()
    checked = {}
    for key, value in extra.items():
        if key in OURS_INSTEAD:
            raise InputError(f"{source} has the key `{key}`; here it is `{OURS_INSTEAD[key]}` that says this.")
        if key in NOT_POSSIBLE:
            raise InputError(f"{source} has the key `{key}`, which is not possible here: {NOT_POSSIBLE[key]}.")
        if key not in known:
            raise InputError(f"{source} has the unknown key `{key}`{_nearest(key, (*_NAMES, *known))}")
        checked[key] = values.coerce(value, known[key], key)
    return checked


def _nearest(key: str, names: Sequence[str]) -> str:
    for candidates, cutoff in ((_NAMES, 0.75), (names, 0.5)):  # a key of ours is likelier to be meant
        lowered = {name.lower(): name for name in candidates if name not in OURS_INSTEAD and name not in NOT_POSSIBLE}
        if found := difflib.get_close_matches(key.lower(), lowered, n=1, cutoff=cutoff):
            return f"; did you mean `{lowered[found[0]]}`?"
    return "; `fourbit train --help` lists the usual ones."
