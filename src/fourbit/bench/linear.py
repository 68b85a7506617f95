"""Few tokens times a 4-bit weight that is in no cache: what decoding text is made of.

One product reads each weight once, so its limit is the bandwidth of reading; more tokens move it towards the limit of
multiplying. bitsandbytes is measured through its public layer in `eval()`, which repacks the weight, and through the
kernel under it, called as that layer calls it but without the layer's own work in Python; so are we.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

from fourbit.bench.case import OURS, Bar, Case, Contender, Measure, Share, Task
from fourbit.bench.cold import copies_beyond_cache, in_turn, weight
from fourbit.bench.machine import READ, read_limit
from fourbit.bench.peers import BITSANDBYTES
from fourbit.formats import quantized_size_bytes

__all__ = ["cases"]

TOKENS = (1, 4, 16, 64, 512)


def cases(quick: bool) -> tuple[Case, ...]:
    """One case per number of tokens."""
    return tuple(_case(quick, tokens) for tokens in (TOKENS[:2] if quick else TOKENS))


def _case(quick: bool, tokens: int) -> Case:
    side = 256 if quick else 4096
    read = quantized_size_bytes(side * side, block_size=64, double_quant=False)
    share = Share(READ, read / 1e9) if tokens == 1 else None
    contenders = [
        Contender(OURS, lambda _: _ours(side, tokens), share=share),
        Contender(f"{OURS}, operation", lambda _: _our_operation(side, tokens), share=share),
        Contender(BITSANDBYTES, lambda _: _bitsandbytes(side, tokens), needs=BITSANDBYTES),
        Contender(f"{BITSANDBYTES}, kernel", lambda _: _bitsandbytes_kernel(side, tokens), needs=BITSANDBYTES),
        Contender("torch, bf16 weights", lambda _: _torch(side, tokens)),
    ]
    bars: tuple[Bar, ...] = ()
    if tokens == 1:
        contenders.append(read_limit(1 << 20 if quick else 1 << 30))
        bars = (
            Bar("speed", BITSANDBYTES, 1.5),
            Bar("speed", f"{BITSANDBYTES}, kernel", 1.5, ours=f"{OURS}, operation"),
            Bar("share", READ, 0.75),
        )
    return Case(
        name=f"linear-{tokens}",
        title=f"linear {side} × {side} in NF4, {tokens} {'token' if tokens == 1 else 'tokens'} in bf16, weights cold",
        measure=Measure("ms", 1e3, is_rate=False),
        contenders=tuple(contenders),
        bars=bars,
        repeats=1 if quick else 7,
        sample_s=0 if quick else 0.1,
    )


def _input(side: int, tokens: int) -> Any:
    import torch

    return torch.randn(tokens, side, generator=torch.Generator().manual_seed(1)).bfloat16()


def _ours(side: int, tokens: int) -> Task:
    import torch
    from torch import nn

    import fourbit

    one, x = weight(side), _input(side, tokens)
    linear = nn.Linear(side, side, bias=False, dtype=torch.bfloat16, device="meta")
    linear.weight = nn.Parameter(one)
    config = fourbit.QuantConfig(format="nf4", block_size=64, double_quant=False)
    layers = [fourbit.nn.QuantLinear.from_linear(linear, config).eval() for _ in range(_copies(side))]
    torch.set_grad_enabled(False)
    return Task(in_turn(layers, lambda layer: layer(x)), _norm)


def _our_operation(side: int, tokens: int) -> Task:
    import torch

    import fourbit
    from fourbit.kernels import ops

    one, x = weight(side), _input(side, tokens)
    config = fourbit.QuantConfig(format="nf4", block_size=64, double_quant=False)
    weights = [fourbit.quantize(one, config) for _ in range(_copies(side))]
    levels = weights[0].levels
    torch.set_grad_enabled(False)
    call = in_turn(
        weights, lambda w: ops.linear(x, w.packed, w.absmax, levels=levels, block_size=64, out_features=side)
    )
    return Task(call, _norm)


def _bitsandbytes(side: int, tokens: int) -> Task:
    """Its layer in `eval()`."""
    x = _input(side, tokens)
    return Task(in_turn(_bitsandbytes_layers(side, x), lambda layer: layer(x)), _norm)


def _bitsandbytes_kernel(side: int, tokens: int) -> Task:
    """What its layer calls on a repacked weight."""
    import torch

    x = _input(side, tokens)
    weights = [layer.weight for layer in _bitsandbytes_layers(side, x)]
    if not getattr(weights[0].quant_state, "packing_format_for_cpu", False):
        raise RuntimeError("it has no packed kernel for this CPU")
    kernel, state = torch.ops.bitsandbytes.gemv_4bit.default, weights[0].quant_state
    packed = [(one.data, one.quant_state.absmax) for one in weights]
    call = in_turn(packed, lambda w: kernel(x, w[0], state.shape, w[1], state.code, state.blocksize))
    return Task(call, _norm)


def _bitsandbytes_layers(side: int, x: Any) -> list[Any]:
    """Its layers after the first call in `eval()`, which repacks the weight."""
    import torch

    torch.set_grad_enabled(False)
    layers: Any = importlib.import_module("bitsandbytes.nn")
    settings = {"compress_statistics": False, "quant_type": "nf4"}
    first = layers.Linear4bit(side, side, bias=False, compute_dtype=torch.bfloat16, device="meta", **settings)
    first.weight = layers.Params4bit(weight(side), requires_grad=False, module=first, **settings)
    first = first.to("cpu").eval()
    first(x)
    return [first, *(copy.deepcopy(first) for _ in range(_copies(side) - 1))]


def _torch(side: int, tokens: int) -> Task:
    import torch

    one, x = weight(side), _input(side, tokens)
    weights = [one.clone() for _ in range(copies_beyond_cache(2 * side * side))]
    torch.set_grad_enabled(False)
    return Task(in_turn(weights, lambda w: torch.nn.functional.linear(x, w)), _norm)


def _copies(side: int) -> int:
    return copies_beyond_cache(side * side // 2)


def _norm(y: Any) -> float:
    return float(y.float().norm())
