"""4-bit codes and scales back to bf16."""

from __future__ import annotations

from fourbit.bench.case import OURS, TUNED_MALLOC, Bar, Case, Contender, Measure, Share, Task
from fourbit.bench.cold import copies_beyond_cache, in_turn, weight
from fourbit.bench.machine import COPY, copy_limit
from fourbit.bench.peers import BITSANDBYTES, TORCHAO, torchao_nf4
from fourbit.formats import quantized_size_bytes

__all__ = ["cases"]

TUNED = f"{BITSANDBYTES}, tuned malloc"


def cases(quick: bool) -> tuple[Case, ...]:
    """NF4 with fp32 scales, and with double-quantized ones, which is what QLoRA trains with."""
    return _case(quick, nested=False), _case(quick, nested=True)


def _case(quick: bool, *, nested: bool) -> Case:
    side = 256 if quick else 4096
    count = side * side
    moved = 2 * count + quantized_size_bytes(count, block_size=64, double_quant=nested)
    scales = ", double-quantized scales" if nested else ""
    return Case(
        name=f"dequantize-nf4{'-nested' if nested else ''}",
        title=f"dequantize NF4 → bf16: {side} × {side}, blocks of 64{scales}",
        measure=Measure("GB/s out", 2 * count / 1e9),
        contenders=(
            Contender(OURS, lambda _: _ours(side, nested), share=Share(COPY, moved / 1e9)),
            Contender(BITSANDBYTES, lambda _: _bitsandbytes(side, nested), needs=BITSANDBYTES),
            Contender(TUNED, lambda _: _bitsandbytes(side, nested), needs=BITSANDBYTES, environment=TUNED_MALLOC),
            *([Contender(TORCHAO, lambda _: _torchao(side), needs=TORCHAO)] if nested else []),  # its scales always are
            copy_limit(1 << 20 if quick else 1 << 30),
        ),
        bars=(Bar("speed", BITSANDBYTES, 8.0), Bar("share", COPY, 0.85)),
        repeats=1 if quick else 7,
        sample_s=0 if quick else 0.1,
    )


def _ours(side: int, nested: bool) -> Task:
    """Into one buffer, as the product of a layer does it."""
    import torch

    import fourbit

    config = fourbit.QuantConfig(format="nf4", block_size=64, double_quant=nested)
    one = weight(side)
    weights = [fourbit.quantize(one, config) for _ in range(copies_beyond_cache(one.numel() // 2))]
    out = torch.empty_like(one)
    return Task(in_turn(weights, lambda quantized: quantized.dequantize(out=out)), lambda _: float(out.float().norm()))


def _bitsandbytes(side: int, nested: bool) -> Task:
    """Its call as its layers make it; it allocates what it returns."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    one = weight(side)
    packed, state = quantize_4bit(one, blocksize=64, quant_type="nf4", compress_statistics=nested)
    weights = [packed.clone() for _ in range(copies_beyond_cache(one.numel() // 2))]
    call = in_turn(weights, lambda codes: dequantize_4bit(codes, state))
    return Task(call, lambda result: float(result.float().norm()))


def _torchao(side: int) -> Task:
    quantized = torchao_nf4().to_nf4(weight(side))
    return Task(quantized.get_original_weight, lambda result: float(result.float().norm()))
