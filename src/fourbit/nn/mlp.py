"""Gated MLPs of any model, with activation and product in one kernel.

Two shapes are known: three projections (Llama and most since; Mixtral's names are w1, w3, w2) and one that makes gate
and up side by side (Phi-3, GLM). What a projection is (a linear layer, a quantized one, one with an adapter) is none of
this file's business: it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.kernels import ops, reference
from fourbit.kernels.ops.swiglu import ACTIVATIONS
from fourbit.nn.fused import DEVICES, Fused

__all__ = ["FusedMLP", "GatedShape", "gated_shape", "prove_mlp"]

_SHAPES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("gate_up_proj", None, "down_proj"))


@dataclass(frozen=True)
class GatedShape:
    """The names of the projections and the activation; `up` is None where `gate` makes both side by side."""

    gate: str
    up: str | None
    down: str
    activation: str = ACTIVATIONS[0]


class FusedMLP(Fused):
    """Runs `ops.swiglu` on a CPU or GPU, and the module's own forward pass elsewhere."""

    fourbit_settings: GatedShape

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        x = args[0] if args else None
        if len(args) != 1 or kwargs or not isinstance(x, Tensor) or x.device.type not in DEVICES:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        shape = self.fourbit_settings
        if shape.up is None:
            gate, up = getattr(self, shape.gate)(x).chunk(2, dim=-1)
        else:
            gate, up = getattr(self, shape.gate)(x), getattr(self, shape.up)(x)
        return getattr(self, shape.down)(ops.swiglu(gate, up, activation=shape.activation))


def gated_shape(module: nn.Module) -> GatedShape | None:
    """The projections of a module that looks like a gated MLP; what it computes is for `prove_mlp` to find out."""
    for gate, up, down in _SHAPES:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in (gate, up, down) if name):
            return GatedShape(gate, up, down)
    return None


def prove_mlp(module: nn.Module, shape: GatedShape) -> GatedShape | str:
    """Find the activation of a gated MLP, and that it does nothing else, by running it with stand-ins for projections.

    The stand-ins return random numbers and note what they were given, so that the proof costs no product, does not
    depend on the weights, and compares act(gate) * up bit for bit, in fp32 and bf16.

    Returns:
        the shape with its activation, or the reason why it is left alone.
    """
    for activation in ACTIVATIONS:
        if all(_agrees(module, shape, activation, dtype) for dtype in (torch.float32, torch.bfloat16)):
            return GatedShape(shape.gate, shape.up, shape.down, activation)
    return "its result is not act(gate) * up with an activation known here"


class _StandIn(nn.Module):
    """Returns what it was told to, and notes its input."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out, self.given = out, out.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.given = x
        return self.out


@torch.no_grad()
def _agrees(module: nn.Module, shape: GatedShape, activation: str, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(size: int) -> Tensor:
        return (3 * torch.randn(2, 3, size, generator=generator)).to(dtype)

    x, gate, up, result = random(8), random(64), random(64), random(8)
    down = _StandIn(result)
    stand_ins = {shape.down: down}
    if shape.up is None:
        stand_ins[shape.gate] = _StandIn(torch.cat((gate, up), dim=-1))
    else:
        stand_ins |= {shape.gate: _StandIn(gate), shape.up: _StandIn(up)}
    try:
        own = _run_with(module, stand_ins, x)
    except Exception:  # another library's code on an input it was not made for: any failure is an answer
        return False
    first = [stand_in.given for name, stand_in in stand_ins.items() if name != shape.down]
    expected = reference.swiglu(gate, up, activation)
    return (
        all(torch.equal(given, x) for given in first)
        and torch.equal(down.given, expected)
        and isinstance(own, Tensor)
        and torch.equal(own, result)
    )


def _run_with(module: nn.Module, stand_ins: dict[str, _StandIn], x: Tensor) -> object:
    own = {name: module._modules[name] for name in stand_ins}
    try:
        module._modules.update(stand_ins)
        return module(x)
    finally:
        module._modules.update(own)
