"""The walk's layers as one native call, where every step of it would run on a native kernel anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fourbit.kernels import dispatch
from fourbit.nn.attention import FusedAttention, FusedRotaryAttention
from fourbit.nn.mlp import FusedMLP
from fourbit.nn.norm import FusedNorm
from fourbit.nn.rotary import prove_rotary, rotary_function

if TYPE_CHECKING:
    from fourbit.kernels.native.decoder import Decoder, Layer, Norm, Product

__all__ = ["native_decoder"]

_NATIVE = "fourbit.kernels.native."
_QUANTIZED = ("packed", "absmax", "nested_absmax", "nested_offset", "levels", "block_size")


def native_decoder(base: Any, cache: Any, visible: Tensor | None, example: Tensor, rotated: int) -> Decoder:
    """One call for all layers and the last norm; the same bits as `Walk` call by call.

    Args:
        base: a decoder that `Walk` takes.
        cache: of filled `Room`s, in growing manner.
        visible: [B, 1, 1, capacity] bool; None for all.
        example: [1, 1, hidden], an input.
        rotated: elements of a head that its rotary embedding turns.

    Raises:
        ValueError: some step is not by a native kernel; says which.
    """
    first = base.layers[0].self_attn
    batch, kv_heads, capacity, head = cache.layers[0].keys.shape
    _prove_attention(base.layers, example, head, rotated)
    mlp = base.layers[0].mlp
    if any(not isinstance(layer.mlp, FusedMLP) or layer.mlp.fourbit_settings.up is None for layer in base.layers):
        raise ValueError("an MLP is not run by our kernel")
    settings = mlp.fourbit_settings
    if any(layer.mlp.fourbit_settings != settings or layer.self_attn.scaling != first.scaling for layer in base.layers):
        raise ValueError("its layers differ in more than weights")
    _need_native("swiglu", example, example, settings.activation)

    from fourbit.kernels.native.decoder import Decoder, Shape  # only where there is a library

    layers = [_layer(layer, example) for layer in base.layers]
    shape = Shape(
        batch, example.shape[2], layers[0].gate.rows, layers[0].q.rows // head, kv_heads, head, rotated, capacity
    )
    return Decoder(
        shape,
        layers,
        _norm(base.norm, example),
        [(room.keys, room.values) for room in cache.layers],
        visible,
        dtype=example.dtype,
        activation=settings.activation,
        scale=first.scaling,
    )


def _prove_attention(layers: Any, example: Tensor, head: int, rotated: int) -> None:
    for layer in layers:
        if not isinstance(layer.self_attn, FusedAttention | FusedRotaryAttention):
            raise ValueError("its attention is not ours")
        function = rotary_function(layer.self_attn)  # type: ignore[arg-type]  # a class that is mixed into a module's
        if function is None or prove_rotary(getattr(function, "__wrapped__", function)) is not None:
            raise ValueError("its rotary embedding is not ours")
    q = example.new_zeros((1, 1, 1, head))
    table = example.new_zeros((1, 1, rotated))
    _need_native("rotary", q, q, table, table, False)
    _need_native("attention", q, q, q, None, False, 1.0)


def _need_native(name: str, *arguments: Any) -> None:
    run = dispatch.OPERATIONS[name].choose(*arguments)
    if not run.__module__.startswith(_NATIVE):
        raise ValueError(f"{name} runs on {run.__module__}")


def _layer(layer: Any, example: Tensor) -> Layer:
    from fourbit.kernels.native.decoder import Layer

    attention, mlp, names = layer.self_attn, layer.mlp, layer.mlp.fourbit_settings
    heads = example.new_zeros((1, 1, 1, attention.head_dim))

    def head_norm(name: str) -> Norm | None:
        module = attention._modules.get(name)
        return None if module is None else _norm(module, heads)

    return Layer(
        norm=_norm(layer.input_layernorm, example),
        mlp_norm=_norm(layer.post_attention_layernorm, example),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        q=_product(attention.q_proj, example),
        k=_product(attention.k_proj, example),
        v=_product(attention.v_proj, example),
        out=_product(attention.o_proj, example),
        gate=_product(getattr(mlp, names.gate), example),
        up=_product(getattr(mlp, names.up), example),
        down=_product(getattr(mlp, names.down), example),
    )


def _norm(module: Any, example: Tensor) -> Norm:
    from fourbit.kernels.native.decoder import Norm

    if not isinstance(module, FusedNorm):
        raise ValueError("a norm is not run by our kernel")
    formula = module.fourbit_settings
    _need_native("rms_norm", example, module.weight, formula.eps, formula.offset, formula.round_first)
    return Norm(module.weight.detach(), formula.eps, formula.offset, formula.round_first)


def _product(module: Any, example: Tensor) -> Product:
    from fourbit.kernels.native.decoder import Product

    found = module.operation(example.new_zeros((1, 1, module.in_features))) if hasattr(module, "operation") else None
    if found is None:
        raise ValueError(f"a {type(module).__name__} is not multiplied straight from 4 bits")
    name, arguments = found
    _need_native(name, example.new_zeros((1, 1, module.in_features)), *arguments)
    weight, rest = dict(zip(_QUANTIZED, arguments, strict=False)), arguments[len(_QUANTIZED) :]
    weight |= {"rows": module.out_features, "cols": module.in_features}
    if name == "linear":
        return Product(**weight, bias=rest[1])
    bias, lora_a, lora_b, scaling = rest[:4]
    return Product(**weight, bias=bias, adapter=(lora_a.detach(), lora_b.detach(), scaling))
