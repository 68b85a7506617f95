"""Root-mean-square norms of any model, run by one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.kernels import ops, reference
from fourbit.nn.fused import DEVICES, Fused

__all__ = ["FusedNorm", "NormFormula", "prove_norm"]

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_CONVENTIONS = ((0.0, True), (1.0, False), (0.0, False))


@dataclass(frozen=True)
class NormFormula:
    """Which formula a norm follows; see `kernels.ops.rms_norm`."""

    eps: float
    offset: float
    round_first: bool


class FusedNorm(Fused):
    """Runs `ops.rms_norm` on a CPU or GPU, and the module's own forward pass elsewhere."""

    fourbit_settings: NormFormula
    weight: nn.Parameter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        x = args[0] if args else None
        if (
            len(args) != 1
            or kwargs
            or not isinstance(x, Tensor)
            or x.device.type not in DEVICES
            or x.dtype != self.weight.dtype
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        formula = self.fourbit_settings
        return ops.rms_norm(x, self.weight, eps=formula.eps, offset=formula.offset, round_first=formula.round_first)


def prove_norm(module: nn.Module) -> NormFormula | str:
    """Find the formula a norm follows, by trying it: bit for bit, with random weights and inputs, in fp32 and bf16.

    Returns:
        the formula, or the reason why none is.
    """
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return "it has no weight vector or no eps"
    for offset, round_first in _CONVENTIONS:
        formula = NormFormula(eps, offset, round_first)
        if all(_agrees(module, formula, weight.shape[0], dtype) for dtype in (torch.float32, torch.bfloat16)):
            return formula
    return "its result is that of no formula known here"


@torch.no_grad()
def _agrees(module: nn.Module, formula: NormFormula, size: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(2, 3, size, generator=generator)).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    try:
        own = torch.func.functional_call(module, {"weight": weight}, (x,))
    except Exception:  # another library's code on an input it was not made for: any failure is an answer
        return False
    ours = reference.rms_norm(x, weight, formula.eps, formula.offset, formula.round_first)
    return isinstance(own, Tensor) and own.dtype == ours.dtype and torch.equal(own, ours)
