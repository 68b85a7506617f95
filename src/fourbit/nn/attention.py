"""The attention of any model of transformers, on `ops.attention`.

Attention layers of transformers look up how to attend by name, in the mapping `ALL_ATTENTION_FUNCTIONS`. Registering a
name of ours there and putting it into the configuration would be the documented way, but wrong for some models: sparse
attention (DeepSeek 3.2, GLM 5) applies its index only if that name is "sdpa" or "eager", and others branch on it too.
So the name stays "sdpa", with the masks and everything else that depends on it, and the forward pass of the one class
is made again with the mapping bound to one that gives our function for that name. Another name still gives its own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.kernels import dispatch, ops
from fourbit.nn.fused import Fused, rebound
from fourbit.nn.rotary import FusedRotary

__all__ = [
    "FusedAttention",
    "FusedRotaryAttention",
    "attention_forward",
    "uses_attention_functions",
    "why_not_attention",
]

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_NAME = "ALL_ATTENTION_FUNCTIONS"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FusedAttention(Fused):
    """The attention layer's own forward pass, attending by `ops.attention`."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {"forward": _attending(base.forward)}


class FusedRotaryAttention(Fused):
    """The same with the rotary embedding of `FusedRotary`."""

    @classmethod
    def members(cls, base: type[nn.Module]) -> dict[str, Any]:
        return {"forward": _attending(FusedRotary.members(base)["forward"])}


def uses_attention_functions(module: nn.Module) -> bool:
    """Whether a module's forward pass looks up how to attend by name."""
    forward = type(module).forward
    return isinstance(forward, types.FunctionType) and _NAME in forward.__code__.co_names


def why_not_attention(module: nn.Module, device: str = "cpu") -> str | None:
    """Why a module that looks up how to attend would gain nothing from our attention; None if it would.

    Args:
        device: the type of the device it runs on. On a GPU torch's own attention is the fastest there is.
    """
    if device != "cpu":
        return f"on {device} it runs on torch's flash or memory-efficient attention"
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if chosen != "sdpa":
        return f"the model is set to {chosen} attention, and only sdpa is replaced"
    runs = dispatch.OPERATIONS["attention"].explain("cpu")
    return None if runs["backend"] != "reference" else runs["why"]


def attention_forward(fallback: AttentionFunction) -> AttentionFunction:
    """A function as `ALL_ATTENTION_FUNCTIONS` holds them, with the meaning of transformers' `sdpa_attention_forward`.

    Args:
        fallback: that function; it gets what `ops.attention` does not take (dropout, a bias that is learned, a paged
            cache, a capped softmax, other devices and dtypes), and refuses what it does not take either.
    """

    def fourbit_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        queries = query.shape[2]
        declared = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = queries > 1 and attention_mask is None and declared
        if (
            dropout
            or kwargs.get("output_attentions")
            or any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap"))
            or not _takes(query, key, value, attention_mask)
            or (causal and key.shape[2] < queries)
        ):
            return fallback(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **kwargs,
            )
        if (
            causal
        ):  # a static cache that is empty but for these tokens: sdpa counts from the first key, we from the last
            key, value = key[:, :, :queries], value[:, :, :queries]
        return ops.attention(query, key, value, mask=attention_mask, causal=causal, scale=scaling), None

    return fourbit_attention_forward


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype in _DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[3] == key.shape[3]
        and (query.dtype != torch.bfloat16 or (query.shape[3] % 2 == 0 and value.shape[3] % 2 == 0))
        and (mask is None or (not mask.requires_grad and (mask.dtype == torch.bool or mask.dtype in _DTYPES)))
    )


def _attending(forward: Callable[..., Any]) -> Callable[..., Any]:
    own: MutableMapping[str, AttentionFunction] = forward.__globals__[_NAME]
    ours = type(own)()
    for name, function in own.items():
        if ours.get(name) is not function:  # what the model's file overrides for itself
            ours[name] = function
    ours["sdpa"] = attention_forward(own["sdpa"])
    return rebound(forward, **{_NAME: ours})
