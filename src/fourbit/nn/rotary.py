"""The rotary position embedding of any model's attention, in one kernel.

Attention layers of transformers call a function of their file, `apply_rotary_pos_emb`. Replacing it in that file would
change every model of the process; so the forward pass of the one class is made again with the name bound to ours.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.kernels import ops, reference
from fourbit.nn.fused import DEVICES, Fused, rebound

__all__ = ["FusedRotary", "prove_rotary", "rotary_function"]

_NAME = "apply_rotary_pos_emb"
_PROVEN: dict[Callable[..., Any], str | None] = {}


class FusedRotary(Fused):
    """The attention layer's own forward pass with `ops.rotary` in place of the function of its file."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        own = base.forward
        return {"forward": rebound(own, **{_NAME: _fused(own.__globals__[_NAME])})}


def rotary_function(module: nn.Module) -> Callable[..., Any] | None:
    """The function by which a module's forward pass rotates queries and keys; None if it has none."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or _NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(_NAME)
    return function if callable(function) else None


def prove_rotary(function: Callable[..., Any]) -> str | None:
    """Whether a function computes what `ops.rotary` does: bit for bit, on random input, in fp32 and bf16.

    Returns:
        None, or the reason why the function is left alone.
    """
    if function not in _PROVEN:
        agree = all(_agrees(function, 8, dtype) for dtype in (torch.float32, torch.bfloat16))
        _PROVEN[function] = None if agree else "its result is not the rotation of halves"
    return _PROVEN[function]


@functools.cache
def _fused(own: Callable[..., Any]) -> Callable[..., Any]:
    """`ops.rotary` where it fits, the model's own function elsewhere."""
    partly = _agrees(own, 6, torch.float32)

    @functools.wraps(own)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        fits = (
            not args
            and kwargs.get("unsqueeze_dim", 1) == 1
            and kwargs.keys() <= {"unsqueeze_dim"}
            and q.device.type in DEVICES
            and q.dim() == k.dim() == 4
            and cos.dim() == 3
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and (cos.shape[-1] == q.shape[-1] or (partly and cos.shape[-1] < q.shape[-1]))
            and (cos.shape[0], *cos.shape[1:2]) in ((1, q.shape[2]), (q.shape[0], q.shape[2]))
            and not (cos.requires_grad or sin.requires_grad)
        )
        if fits:
            return ops.rotary(q, k, cos, sin)
        result: tuple[Tensor, Tensor] = own(q, k, cos, sin, *args, **kwargs)
        return result

    return apply_rotary_pos_emb


@torch.no_grad()
def _agrees(function: Callable[..., Any], rotated: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, k = random(2, 4, 5, 8), random(2, 2, 5, 8)
    cos, sin = random(2, 5, rotated), random(2, 5, rotated)
    try:
        own = function(q, k, cos, sin)
        ours = reference.rotary(q, k, cos, sin, False)
        return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(own, ours, strict=True))
    except Exception:  # another library's code on an input it was not made for: any failure is an answer
        return False
