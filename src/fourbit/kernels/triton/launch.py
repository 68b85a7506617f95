"""What every launch of a Triton kernel needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["guard"]


def guard(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one: Triton launches there, wherever its arguments lie."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
