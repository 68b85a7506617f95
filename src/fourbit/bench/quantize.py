"""16-bit weights to 4-bit codes and scales."""

from __future__ import annotations

from typing import Any

from fourbit.bench.case import OURS, TUNED_MALLOC, Bar, Case, Contender, Measure, Share, Task
from fourbit.bench.cold import copies_beyond_cache, in_turn, weight
from fourbit.bench.machine import COPY, copy_limit
from fourbit.bench.peers import BITSANDBYTES, TORCHAO, torchao_nf4
from fourbit.formats import quantized_size_bytes

__all__ = ["cases"]

TUNED = f"{BITSANDBYTES}, tuned malloc"


def cases(quick: bool) -> tuple[Case, ...]:
    """NF4 with fp32 scales: the operation alone."""
    side = 256 if quick else 4096
    count = side * side
    moved = 2 * count + quantized_size_bytes(count, block_size=64, double_quant=False)
    return (
        Case(
            name="quantize-nf4",
            title=f"quantize to NF4: bf16 weights {side} × {side}, blocks of 64",
            measure=Measure("M elements/s", count / 1e6),
            contenders=(
                Contender(OURS, lambda _: _ours(side), share=Share(COPY, moved / 1e9)),
                Contender(BITSANDBYTES, lambda _: _bitsandbytes(side), needs=BITSANDBYTES),
                Contender(TUNED, lambda _: _bitsandbytes(side), needs=BITSANDBYTES, environment=TUNED_MALLOC),
                Contender(TORCHAO, lambda _: _torchao(side), needs=TORCHAO),
                copy_limit(1 << 20 if quick else 1 << 30),
            ),
            bars=(Bar("speed", BITSANDBYTES, 50.0),),
            repeats=1 if quick else 7,
            sample_s=0 if quick else 0.1,
        ),
    )


def _ours(side: int) -> Task:
    import fourbit

    config = fourbit.QuantConfig(format="nf4", block_size=64, double_quant=False)
    weights = [weight(side) for _ in range(copies_beyond_cache(2 * side * side))]
    call = in_turn(weights, lambda one: fourbit.quantize(one, config))
    return Task(call, lambda quantized: _norm(quantized.dequantize()))


def _bitsandbytes(side: int) -> Task:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = [weight(side) for _ in range(copies_beyond_cache(2 * side * side))]
    call = in_turn(weights, lambda one: quantize_4bit(one, blocksize=64, quant_type="nf4", compress_statistics=False))
    return Task(call, lambda result: _norm(dequantize_4bit(*result)))


def _torchao(side: int) -> Task:
    """Its NF4 tensor, whose scales are always double-quantized."""
    to_nf4 = torchao_nf4().to_nf4
    weights = [weight(side) for _ in range(copies_beyond_cache(2 * side * side))]
    return Task(in_turn(weights, to_nf4), lambda quantized: _norm(quantized.get_original_weight()))


def _norm(decoded: Any) -> float:
    return float(decoded.float().norm())
