"""Which optimizer a run takes, by transformers' names: those of bitsandbytes' paged and 8-bit AdamW stand for ours."""

from __future__ import annotations

from typing import Any

import torch

from fourbit.memory.advice import PAGED_BUDGET_BYTES
from fourbit.optim import PagedAdamW
from fourbit.train.config import OURS_BY_NAME, TrainConfig
from fourbit.words import parse_size

__all__ = ["budgets", "optimizer"]


def optimizer(config: TrainConfig) -> tuple[type[PagedAdamW], dict[str, Any]] | None:
    """What transformers' `Trainer` takes as `optimizer_cls_and_kwargs`; None where the name is none of ours."""
    bits = OURS_BY_NAME.get(config.optim)
    if bits is None:
        return None
    given = {
        "lr": config.learning_rate,
        "betas": (float(config.extra.get("adam_beta1", 0.9)), config.adam_beta2),
        "eps": float(config.extra.get("adam_epsilon", 1e-8)),
        "state_bits": bits,
        "page_elements": config.optim_page_elements,
        "master_weights": config.optim_master_weights,
        **budgets(config, on_gpu=torch.cuda.is_available()),
    }
    return PagedAdamW, given


def budgets(config: TrainConfig, *, on_gpu: bool) -> dict[str, Any]:
    """The budgets in bytes, and the folder of the file behind them, as `PagedAdamW` takes them."""
    device, host = config.optim_device_budget, config.optim_host_budget
    device_bytes = None if device is None else parse_size(device, "`optim_device_budget`")
    host_bytes = None if host is None else parse_size(host, "`optim_host_budget`")
    if not on_gpu:
        device_bytes = None  # the pages are in host memory, once
    elif device_bytes is None and (config.optim.startswith("paged") or host_bytes is not None):
        device_bytes = PAGED_BUDGET_BYTES
    folder = None if host_bytes is None else config.optim_folder or config.output
    return {"device_budget_bytes": device_bytes, "host_budget_bytes": host_bytes, "folder": folder}
