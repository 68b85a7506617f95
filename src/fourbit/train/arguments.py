"""What trl is told of a config."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTConfig

from fourbit.errors import InputError
from fourbit.train.config import USUAL_LENGTH, TrainConfig

__all__ = ["arguments", "check_trackers", "multiple"]

PACKED_MULTIPLE = 64
"""Packed rows are padded to a multiple of so many tokens; see `multiple`."""


def arguments(config: TrainConfig, *, evaluates: bool) -> SFTConfig:
    """What trl is told.

    Raises:
        InputError: it refuses a value.
    """
    steps = {name: _whole(getattr(config, name)) for name in ("eval_steps", "save_steps", "logging_steps")}
    half = config.dtype == "float16" and torch.cuda.is_available()
    given = {
        "output_dir": config.output,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        **_no_checkpointing(),
        "max_steps": config.max_steps,
        "num_train_epochs": config.num_train_epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        # A share is rounded up, and the first step of a warm-up has the rate 0: a run of one step would learn nothing.
        "warmup_steps": 0 if config.max_steps == 1 and config.warmup_steps < 1 else _whole(config.warmup_steps),
        "optim": "paged_adamw_32bit" if config.optim == "paged_adamw" else config.optim,
        "adam_beta2": config.adam_beta2,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "data_seed": config.data_seed,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_on_start": evaluates and config.eval_on_start,
        "save_strategy": "steps",
        "save_total_limit": config.save_total_limit,
        "report_to": config.report_to,
        "bf16": False,  # the model computes in its own dtype, without autocast
        "fp16": half,
        "packing": config.packing,
        "max_length": config.max_length,
        "pad_to_multiple_of": PACKED_MULTIPLE if config.packing else multiple(config.max_length or USUAL_LENGTH),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # or a diverged run would show the mean of what came before
        "use_cpu": not torch.cuda.is_available(),
    }
    try:
        return SFTConfig(**{**given, **steps, **config.extra})
    except (TypeError, ValueError) as error:
        raise InputError(f"The training cannot be set up so: {_first_line(error)}") from error


def check_trackers(told: SFTConfig) -> None:
    """See that what `report_to` names can be used.

    Raises:
        InputError: it is unknown or not installed.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for tracker in get_reporting_integration_callbacks(told.report_to):
            tracker()
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"`report_to` cannot be used: {_first_line(error)}") from error


def multiple(max_length: int) -> int:
    """Of how many tokens each row's length is a multiple, so that there are 32 lengths at most.

    Freed memory is kept for the next step (`fourbit.prepare`), and oneDNN keeps a kernel for every shape: with a new
    shape in every step little of the one would fit again, and the other grows. Packed rows of 700 to 1,024 tokens took
    1.4 GB as they came, 0.57 GB in multiples of 64.
    """
    return min(128, max(8, 1 << (max_length // 32).bit_length() - 1))


def _no_checkpointing() -> dict[str, Any]:
    """`fourbit.prepare` has turned it on in the model; under its older name transformers now warns of it."""
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__:
        return {"gradient_checkpointing": None, "activation_checkpointing": False}
    return {"gradient_checkpointing": False}


def _whole(value: float) -> float | int:
    """Steps as transformers wants them: a share below 1, or a whole number."""
    return int(value) if value >= 1 and float(value).is_integer() else value


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
