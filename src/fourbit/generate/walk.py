"""A step of decoding on a CPU without the model's Python: one kernel after the other.

For one token, what transformers does around the products of a layer (modules in modules, decorators, masks, dispatch)
takes as long as the products. Most models are built the same way,

    h = h + o(attend(rotate(q(norm h)), rotate(k(norm h)), v(norm h)))
    h = h + down(act(gate(norm' h)) * up(norm' h))

and for those this file keeps a flat list of what to call. Nothing is decided by a model's name: the modules must be of
that build, the parts proven as `fourbit.prepare` proves them (`nn.norm`, `nn.mlp`, `nn.rotary`), and the first token
goes both ways: where the hidden state is not that of the model's own forward pass, bit for bit, the walk is not taken.
Attention is the function that the model itself would call.

Where every step would run on a native kernel, all layers of a token are one native call (`generate.native_walk`), with
the same bits: between kernels Python took a quarter of a token's time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from fourbit.generate.cache import Room
from fourbit.generate.native_walk import native_decoder
from fourbit.kernels import dispatch, reference
from fourbit.nn.attention import FusedAttention, FusedRotaryAttention
from fourbit.nn.linear import QuantLinear
from fourbit.nn.loss import FusedHead
from fourbit.nn.mlp import FusedMLP, GatedShape, gated_shape, prove_mlp
from fourbit.nn.norm import FusedNorm
from fourbit.nn.rotary import prove_rotary, rotary_function

if TYPE_CHECKING:
    from fourbit.kernels.native.decoder import Decoder

__all__ = ["Walk"]

_LOG = logging.getLogger("fourbit")

Call = Callable[[Tensor], Tensor]

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}


@dataclass(slots=True)
class _Layer:
    """What to call for one layer."""

    norm: Call
    q: Call
    k: Call
    v: Call
    q_norm: Call | None
    k_norm: Call | None
    heads: int
    attend: Callable[..., tuple[Tensor, Any]]
    out: Call
    mlp_norm: Call
    gate: Call
    up: Call | None
    activate: Callable[[Tensor, Tensor], Tensor]
    down: Call
    room: Room


class Walk:
    """One step of decoding; see the file's head.

    Args:
        model: of transformers, on a CPU, after its prompts.
        cache: of `Room`s, filled with them.
        inputs: that transformers prepared for the prompts.

    Raises:
        ValueError: the model is not of this build; says in what.
    """

    def __init__(self, model: Any, cache: Any, inputs: dict[str, Any]) -> None:
        base = model.get_decoder()
        if model.training or set(base._modules) != {"embed_tokens", "layers", "norm", "rotary_emb"}:
            raise ValueError(f"a {type(base).__name__} is not embeddings, layers, a norm and a rotary embedding")
        if any(map(_is_watched, model.modules())) or _anyone_watches():
            raise ValueError("somebody has hooked into its modules")
        self._embed, self._rotary_embedding = base.embed_tokens.forward, base.rotary_emb
        self._head = model.get_output_embeddings()
        weight = base.embed_tokens.weight
        example = weight.new_zeros((1, 1, model.config.get_text_config(decoder=True).hidden_size))
        self._rotate = _rotation(base.layers[0].self_attn, weight.dtype)
        self._norm = _norm(base.norm, example)
        self._layers = [_layer(layer, room, example) for layer, room in zip(base.layers, cache.layers, strict=True)]
        self._score = _scores(self._head, example)
        self._visible = _visible(inputs.get("attention_mask"), cache)
        self._positions = inputs["position_ids"][:, -1:] + 1
        self._decoder = self._one_call(base, cache, example)

    def __call__(self, text: Tensor) -> Tensor:
        """See `decode.Step`."""
        return self._score(self.hidden(text))[:, -1]

    def hidden(self, text: Tensor) -> Tensor:
        """[B, T] tokens to the last hidden state [B, 1, K] of the last of them."""
        x: Tensor = self._embed(text[:, -1:])
        cos, sin = self._rotary_embedding(x, position_ids=self._positions)
        self._positions = self._positions + 1
        if self._decoder is not None:
            place = max(layer.room.advance(1) for layer in self._layers)
            self._decoder(x, place, cos, sin)
            return x
        visible = self._visible
        mask = None if visible is None else visible[..., : text.shape[1]]
        batch, rotate = x.shape[0], self._rotate
        for layer in self._layers:
            normed = layer.norm(x)
            shape = (batch, 1, -1, layer.heads)
            q, k = layer.q(normed).view(shape), layer.k(normed).view(shape)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = layer.q_norm(q), layer.k_norm(k)
            q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            keys, values = layer.room.update(k, layer.v(normed).view(shape).transpose(1, 2))
            attended = layer.attend(q, keys, values, mask)[0]
            x = x + layer.out(attended.reshape(batch, 1, -1))
            normed = layer.mlp_norm(x)
            gate = layer.gate(normed)
            if layer.up is None:
                gate, up = gate.chunk(2, dim=-1)
            else:
                up = layer.up(normed)
            x = x + layer.down(layer.activate(gate, up))
        return self._norm(x)

    def _one_call(self, base: Any, cache: Any, example: Tensor) -> Decoder | None:
        """All layers in one native call, where that is the same."""
        cos, _ = self._rotary_embedding(example, position_ids=self._positions)
        try:
            return native_decoder(base, cache, self._visible, example, cos.shape[-1])
        except ValueError as reason:
            _LOG.debug("decoding by one kernel after the other: %s", reason)
            return None

    def trial(self, text: Tensor) -> Tensor:
        """The logits of the first token, by the model's own head, with the cache left as it was."""
        logits: Tensor = self._head(self.hidden(text))[:, -1]
        for layer in self._layers:
            layer.room.take_back(1)
        return logits

    def resume(self) -> None:
        """Nothing: what it counts, the trial has counted."""


def _layer(layer: nn.Module, room: Room, example: Tensor) -> _Layer:
    attention: Any = layer._modules.get("self_attn")
    if set(layer._modules) != _LAYER or not _ATTENTION <= set(attention._modules) <= _ATTENTION | _HEAD_NORMS:
        raise ValueError(f"a {type(layer).__name__} has other parts than two norms, an attention and an MLP")
    if room.window is not None:
        raise ValueError("it attends within a window")
    head, modules = attention.head_dim, attention._modules
    shape, activate = _mlp(layer.mlp, example.dtype)
    heads = example.new_zeros((1, 1, 1, head))
    attended = example.new_zeros((1, 1, attention.o_proj.in_features))
    inner = example.new_zeros((1, 1, getattr(layer.mlp, shape.down).in_features))
    return _Layer(
        norm=_norm(layer.input_layernorm, example),
        q=_product(attention.q_proj, example),
        k=_product(attention.k_proj, example),
        v=_product(attention.v_proj, example),
        q_norm=_norm(modules["q_norm"], heads) if "q_norm" in modules else None,
        k_norm=_norm(modules["k_norm"], heads) if "k_norm" in modules else None,
        heads=head,
        attend=_attention(attention),
        out=_product(attention.o_proj, attended),
        mlp_norm=_norm(layer.post_attention_layernorm, example),
        gate=_product(getattr(layer.mlp, shape.gate), example),
        up=None if shape.up is None else _product(getattr(layer.mlp, shape.up), example),
        activate=activate,
        down=_product(getattr(layer.mlp, shape.down), inner),
        room=room,
    )


def _norm(module: Any, example: Tensor) -> Call:
    if not isinstance(module, FusedNorm) or module.weight.dtype != example.dtype:
        own: Call = module.forward
        return own
    formula, weight = module.fourbit_settings, module.weight
    settings = formula.eps, formula.offset, formula.round_first
    run = dispatch.OPERATIONS["rms_norm"].choose(example, weight, *settings)
    return lambda x: run(x, weight, *settings)


def _mlp(module: Any, dtype: torch.dtype) -> tuple[GatedShape, Callable[[Tensor, Tensor], Tensor]]:
    if isinstance(module, FusedMLP):
        shape: GatedShape = module.fourbit_settings
        gate = torch.zeros((1, 1, getattr(module, shape.down).in_features), dtype=dtype)
        run = dispatch.OPERATIONS["swiglu"].choose(gate, gate, shape.activation)
    else:
        found = gated_shape(module)
        proved = "it is no gated MLP" if found is None else prove_mlp(module, found)
        if isinstance(proved, str):
            raise ValueError(f"{type(module).__name__}: {proved}")
        shape, run = proved, reference.swiglu
    activation = shape.activation
    return shape, lambda gate, up: run(gate, up, activation)


def _rotation(attention: nn.Module, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rotary embedding that the attention's forward pass would call."""
    function = rotary_function(attention)
    if function is None:
        raise ValueError("its attention has no rotary embedding")
    own = getattr(function, "__wrapped__", function)
    if prove_rotary(own) is not None:
        return function
    x = torch.zeros((1, 1, 1, 8), dtype=dtype)
    run = dispatch.OPERATIONS["rotary"].choose(x, x, x[0], x[0], False)
    return lambda q, k, cos, sin: run(q, k, cos, sin, False)


def _attention(module: Any) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function that the module's forward pass would call."""
    functions = type(module).forward.__globals__.get("ALL_ATTENTION_FUNCTIONS")
    name = module.config._attn_implementation
    if functions is None or name != "sdpa":
        raise ValueError(f"it attends in a way of its own ({name})")
    scale: float = module.scaling
    if isinstance(module, FusedAttention | FusedRotaryAttention):
        operation = dispatch.OPERATIONS["attention"]
        return lambda q, keys, values, mask: operation(q, keys, values, mask, False, scale)
    return partial(functions[name], module, dropout=0.0, scaling=scale)


def _product(module: Any, example: Tensor) -> Call:
    """A linear layer of torch, or one of ours that can be called directly; any other is called as it is."""
    if type(module) is nn.Linear:
        return partial(functional.linear, weight=module.weight, bias=module.bias)
    bound: Call | None = module.bind(example) if hasattr(module, "bind") else None
    return bound or module


def _scores(head: Any, example: Tensor) -> Call:
    """The output head, by a kernel that reads a weight in 16 bits at the speed of the memory."""
    plain = type(head) is nn.Linear or (isinstance(head, FusedHead) and not isinstance(head, QuantLinear))
    if not plain or head.weight.dtype != example.dtype:
        return _product(head, example)
    weight, bias = head.weight, head.bias
    operation = dispatch.OPERATIONS["dense"]
    return lambda x: operation(x, weight, bias)


def _visible(mask: Tensor | None, cache: Any) -> Tensor | None:
    """[B, 1, 1, capacity] bool: padding on the left is hidden, all that comes is seen; None if nothing is hidden."""
    if mask is None or bool(mask.all()):
        return None
    capacity = cache.layers[0].keys.shape[2]
    visible = mask.new_ones((mask.shape[0], 1, 1, capacity), dtype=torch.bool)
    visible[:, 0, 0, : mask.shape[1]] = mask.bool()
    return visible


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def _anyone_watches() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
