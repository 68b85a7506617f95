"""Reference: a product with a weight that is not quantized, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense"]


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `kernels.ops.dense`."""
    return torch.nn.functional.linear(x, weight, bias)
