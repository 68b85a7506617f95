"""Finetuning: a config in, an adapter and a report out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["TrainConfig", "TrainResult", "train"]

if TYPE_CHECKING:
    from fourbit.train.config import TrainConfig
    from fourbit.train.run import TrainResult, train

_HOMES = {"TrainConfig": "config", "TrainResult": "run", "train": "run"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fourbit.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fourbit.train.{_HOMES[name]}"), name)
