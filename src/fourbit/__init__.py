"""Finetune, run, judge and export large language models whose base weights are frozen in 4 bits (QLoRA).

Importing this is cheap: each public name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

_HOMES = {
    "QuantConfig": "fourbit.quant.config",
    "QuantizedTensor": "fourbit.quant.tensor",
    "backends": "fourbit.kernels",
    "evaluate": "fourbit.evaluate",
    "load": "fourbit.models.loading",
    "nn": "fourbit.nn",
    "optim": "fourbit.optim",
    "plan": "fourbit.memory.plan",
    "prepare": "fourbit.models.prepare",
    "quantize": "fourbit.quant.tensor",
    "quantize_module": "fourbit.nn.convert",
}

__all__ = [
    "QuantConfig",
    "QuantizedTensor",
    "__version__",
    "backends",
    "evaluate",
    "load",
    "nn",
    "optim",
    "plan",
    "prepare",
    "quantize",
    "quantize_module",
]

if TYPE_CHECKING:
    from fourbit import evaluate, nn, optim
    from fourbit.kernels import backends
    from fourbit.memory.plan import plan
    from fourbit.models.loading import load
    from fourbit.models.prepare import prepare
    from fourbit.nn.convert import quantize_module
    from fourbit.quant.config import QuantConfig
    from fourbit.quant.tensor import QuantizedTensor, quantize


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fourbit' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if _HOMES[name] == f"fourbit.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
