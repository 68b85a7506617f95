"""The cases of a device: what is measured under which name, and what we ask of ourselves.

Rows carry a case's name and nothing else of it, so a name says all that a case is made of, and `named` makes it again
when rows are shown. How it is measured stands in the section of its kind. Importing this imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourbit.bench.case import OURS, Bar, Case, Contender, Measure, Share, Task
from fourbit.bench.machine import COPY, GEMM_BF16, READ
from fourbit.bench.peers import BITSANDBYTES, TORCHAO, UNSLOTH
from fourbit.bench.step import step_flops
from fourbit.formats import quantized_size_bytes
from fourbit.models.shapes import SHAPES, Shape, shape_of

__all__ = [
    "ADAPTERS_ONLY",
    "BATCHES",
    "BNB_EAGER",
    "BNB_KERNEL",
    "BNB_LEAN",
    "FP32_STATES",
    "MATRICES",
    "ON_THE_DEVICE",
    "OUR_LORA",
    "PEFT_LORA",
    "PLAIN_SCALES",
    "TOKENS",
    "TORCH_BF16",
    "UNSLOTH_STEP",
    "decode_case",
    "decode_weight_bytes",
    "dequantize_case",
    "gemm_side",
    "linear_case",
    "machine_case",
    "memory_case",
    "named",
    "paging_case",
    "quantize_case",
    "step_case",
    "variant",
]

MATRICES = ((4096, 4096), (11008, 4096), (4096, 11008), (22016, 8192), (8192, 22016))
"""[N, K] of the linear layers of LLaMA 7B and 65B."""

TOKENS = (1, 2, 4, 8, 16, 32, 64, 512, 8192)
BATCHES = (1, 8, 32)

PLAIN_SCALES = f"{OURS}, fp32 scales"
OUR_LORA, PEFT_LORA = f"{OURS}, 16-bit LoRA", "peft, 16-bit LoRA"
BNB_KERNEL, BNB_EAGER = f"{BITSANDBYTES}, kernel", f"{BITSANDBYTES}, dequantize + linear"
BNB_LEAN, UNSLOTH_STEP = f"{BITSANDBYTES} + peft", UNSLOTH
TORCH_BF16 = "torch, bf16 weights"
ADAPTERS_ONLY, FP32_STATES = OURS, f"{OURS}, fp32 states"
ON_THE_DEVICE = f"{OURS}, all states on the device"

PEAK_GB = {
    "llama-7b": (5.0, 6.3),
    "llama-13b": (9.0, 11.0),
    "llama-33b": (21.0, 24.5),
    "llama-65b": (40.0, 46.0),
}
"""The bars for peak memory: optimizer states elsewhere, and by count with fp32 states on the device."""


def variant(name: str) -> str:
    """How one way among several of running an operation of ours is called as a contender."""
    return f"{OURS}, variant {name}"


def _in_section(folder: Path) -> Task:
    raise NotImplementedError(f"This case is measured by its section, not by a process of its own ({folder}).")


def _contender(name: str, **others: Any) -> Contender:
    return Contender(name, _in_section, **others)


def _limit(name: str, unit: str, amount: float) -> Contender:
    return _contender(name, measure=Measure(unit, amount))


def machine_case(copied_bytes: int, side: int) -> Case:
    """What the device itself can do.

    Args:
        copied_bytes: of the buffer that is copied, and that is read.
        side: of the square matrices that are multiplied.
    """
    return Case(
        name="device-machine",
        title="the device: a large buffer copied and read, and square matrices multiplied in bf16",
        measure=Measure("GB/s", 2 * copied_bytes / 1e9),
        contenders=(
            _limit(COPY, "GB/s", 2 * copied_bytes / 1e9),
            _limit(READ, "GB/s", copied_bytes / 1e9),
            _limit(GEMM_BF16, "GFLOP/s", 2 * side**3 / 1e9),
        ),
    )


def quantize_case(rows: int, columns: int, copied_bytes: int) -> Case:
    """bf16 weights to NF4 with fp32 scales."""
    count = rows * columns
    moved = 2 * count + quantized_size_bytes(count, block_size=64, double_quant=False)
    share = Share(COPY, moved / 1e9)
    return Case(
        name=f"quantize-{rows}x{columns}",
        title=f"quantize to NF4: bf16 weights {rows} × {columns}, blocks of 64",
        measure=Measure("G elements/s", count / 1e9),
        contenders=(
            _contender(OURS, share=share),
            _contender(BITSANDBYTES, needs=BITSANDBYTES, share=share),
            _contender(TORCHAO, needs=TORCHAO),
            _limit(COPY, "GB/s", 2 * copied_bytes / 1e9),
        ),
        bars=(Bar("share", COPY, 0.5),),
        tolerance=0.02,
    )


def dequantize_case(rows: int, columns: int, copied_bytes: int, *, nested: bool, variants: Sequence[str] = ()) -> Case:
    """NF4 back to bf16."""
    count = rows * columns
    share = Share(COPY, (2 * count + quantized_size_bytes(count, block_size=64, double_quant=nested)) / 1e9)
    return Case(
        name=f"dequantize-{rows}x{columns}{'-nested' if nested else ''}",
        title=f"dequantize NF4 → bf16: {rows} × {columns}{', double-quantized scales' if nested else ''}",
        measure=Measure("GB/s out", 2 * count / 1e9),
        contenders=(
            _contender(OURS, share=share),
            *(_contender(variant(name), share=share) for name in variants),
            _contender(BITSANDBYTES, needs=BITSANDBYTES, share=share),
            _contender(TORCHAO, needs=TORCHAO),
            _limit(COPY, "GB/s", 2 * copied_bytes / 1e9),
        ),
        bars=(Bar("share", COPY, 0.85),),
    )


def linear_case(rows: int, columns: int, tokens: int, copied_bytes: int, *, variants: Sequence[str] = ()) -> Case:
    """Tokens times a weight [N, K] in NF4, double-quantized."""
    count = rows * columns
    packed = quantized_size_bytes(count, block_size=64, double_quant=True)
    reads = tokens <= 16  # beyond, multiplying begins to count
    share = Share(READ, packed / 1e9) if reads else Share(GEMM_BF16, 2.0 * tokens * count / 1e9)
    plain = Share(READ, quantized_size_bytes(count, block_size=64, double_quant=False) / 1e9) if reads else share
    wide = Share(READ, 2 * count / 1e9) if reads else share
    bars = []
    if tokens == 1:
        bars.append(Bar("speed", PLAIN_SCALES, 0.97))
        if packed >= 20e6:
            bars.append(Bar("share", READ, 0.7))
    if 8 <= tokens <= 32:
        bars.append(Bar("speed", TORCH_BF16, 1.0))
    return Case(
        name=f"linear-{rows}x{columns}-{tokens}",
        title=f"linear {rows} × {columns} in NF4, {tokens} token{'s' if tokens > 1 else ''} in bf16, weights cold",
        measure=Measure("µs", 1e6, is_rate=False),
        contenders=(
            _contender(OURS, share=share),
            _contender(PLAIN_SCALES, share=plain),
            *(_contender(variant(name), share=share) for name in variants),
            _contender(BNB_KERNEL, needs=BITSANDBYTES, share=plain),
            _contender(BNB_EAGER, needs=BITSANDBYTES, share=plain),
            _contender(TORCHAO, needs=TORCHAO, share=share),
            _contender(TORCH_BF16, share=wide),
            _limit(READ, "GB/s", copied_bytes / 1e9)
            if reads
            else _limit(GEMM_BF16, "GFLOP/s", 2 * gemm_side(copied_bytes) ** 3 / 1e9),
        ),
        bars=tuple(bars),
    )


def gemm_side(copied_bytes: int) -> int:
    """The side of the matrices whose product is the limit, beside a buffer of that size."""
    return 8192 if copied_bytes >= 1 << 28 else 256


def step_case(
    shape: str, *, checkpointing: bool, batch: int, length: int, rank: int, layers: int | None = None
) -> Case:
    """Forward, loss, backward and AdamW with adapters on all linear layers."""
    tokens = batch * length
    work = Share(GEMM_BF16, step_flops(shape, tokens, checkpointing=checkpointing, layers=layers) / 1e9)
    others = (BNB_LEAN, UNSLOTH_STEP, PEFT_LORA, OUR_LORA)
    needs = {BNB_LEAN: BITSANDBYTES, UNSLOTH_STEP: UNSLOTH}
    return Case(
        name=f"{_shaped('step', shape, layers)}-{batch}x{length}-r{rank}{'-checkpointing' if checkpointing else ''}",
        title=f"QLoRA step, {_in_words(shape, layers)}, {batch} × {length} tokens, r = {rank} on all linears, bf16"
        + (", gradient checkpointing" if checkpointing else ""),
        measure=Measure("tokens/s", tokens),
        contenders=(
            _contender(OURS, share=work),
            *(_contender(name, needs=needs.get(name), share=work) for name in others),
            _limit(GEMM_BF16, "GFLOP/s", 1.0),
        ),
        bars=(
            Bar("speed", UNSLOTH_STEP, 1.2),
            Bar("speed", BNB_LEAN, 1.8),
            Bar("speed", PEFT_LORA, 0.9),
            Bar("speed", OUR_LORA, 0.9),
        ),
        tolerance=0.05,
    )


def decode_case(shape: str, batch: int, *, layers: int | None = None) -> Case:
    """Greedy decoding, per new token of every row; the prompt is left out."""
    weights = decode_weight_bytes(shape_of(shape), four_bits=True, layers=layers)
    wide = decode_weight_bytes(shape_of(shape), four_bits=False, layers=layers)
    bars = []
    if batch == 1:
        bars = [Bar("share", READ, 0.45 if SHAPES[shape].parameters < 20e9 else 0.6), Bar("speed", BNB_EAGER, 8.0)]
    else:
        bars = [Bar("speed", TORCH_BF16, 1.0)]
    return Case(
        name=f"{_shaped('decode', shape, layers)}-{batch}",
        title=f"greedy decode, {_in_words(shape, layers)}, batch {batch}",
        measure=Measure("tokens/s", batch),
        contenders=(
            _contender(OURS, share=Share(READ, weights / 1e9)),
            _contender(PLAIN_SCALES, share=Share(READ, weights / 1e9)),
            _contender(BNB_EAGER, needs=BITSANDBYTES, share=Share(READ, weights / 1e9)),
            _contender(TORCH_BF16, share=Share(READ, wide / 1e9)),
            _limit(READ, "GB/s", 1.0),
        ),
        bars=(*bars, Bar("speed", PLAIN_SCALES, 0.97)),
        tolerance=1.0,  # what is decoded is compared id by id, in its section
    )


def memory_case(shape: str, *, length: int, rank: int, layers: int | None = None) -> Case:
    """The most that torch's allocator holds during training steps of batch 1."""
    bounds = PEAK_GB.get(shape) if layers is None else None
    return Case(
        name=f"{_shaped('memory', shape, layers)}-1x{length}-r{rank}",
        title=f"peak memory of a QLoRA step, {_in_words(shape, layers)}, 1 × {length} tokens, r = {rank} on all"
        " linears, gradient checkpointing, bf16 adapters",
        measure=Measure("GB", 1.0, is_rate=False),
        contenders=(_contender(ADAPTERS_ONLY), _contender(FP32_STATES)),
        bars=(Bar("value", "", bounds[0]), Bar("value", "", bounds[1], ours=FP32_STATES)) if bounds else (),
        tolerance=1.0,
    )


def paging_case(shape: str, *, batch: int, length: int, rank: int, layers: int | None = None) -> Case:
    """A training step whose optimizer's states are in the host's memory but for a few pages."""
    return Case(
        name=f"{_shaped('paging', shape, layers)}-{batch}x{length}-r{rank}",
        title=f"QLoRA step with paged optimizer states, {_in_words(shape, layers)}, {batch} × {length} tokens,"
        f" r = {rank} on all linears, bf16, gradient checkpointing",
        measure=Measure("tokens/s", batch * length),
        contenders=(_contender(OURS), _contender(ON_THE_DEVICE)),
        bars=(Bar("speed", ON_THE_DEVICE, 0.95),),
    )


def decode_weight_bytes(shape: Shape, *, four_bits: bool, layers: int | None = None) -> int:
    """What must be read for one token: the layers and the head, and none of the embeddings but a row.

    The norms, a thousandth of it, are counted as if they were quantized, too.
    """
    depth = shape.settings["num_hidden_layers"]
    in_layers = shape.layer_parameters * (layers or depth) // depth
    head = 2 * shape.head_parameters
    return head + (quantized_size_bytes(in_layers, block_size=64, double_quant=True) if four_bits else 2 * in_layers)


def named(name: str, variants: Sequence[str] = ()) -> Case | None:
    """The case of a name, in full size; None where it is no case of a device.

    Args:
        variants: names of other ways of running our operations, which are contenders, too.
    """
    size = 1 << 30
    if name == "device-machine":
        return machine_case(size, gemm_side(size))
    if found := re.fullmatch(r"quantize-(\d+)x(\d+)", name):
        return quantize_case(int(found[1]), int(found[2]), size)
    if found := re.fullmatch(r"dequantize-(\d+)x(\d+)(-nested)?", name):
        return dequantize_case(int(found[1]), int(found[2]), size, nested=bool(found[3]), variants=variants)
    if found := re.fullmatch(r"linear-(\d+)x(\d+)-(\d+)", name):
        return linear_case(int(found[1]), int(found[2]), int(found[3]), size, variants=variants)
    return _named_of_shape(name)


_OF_SHAPE = re.compile(
    r"(?P<kind>step|decode|memory|paging)-(?P<shape>.+?)(-(?P<layers>\d+)layers)?"
    r"(-(?P<batch>\d+)(x(?P<length>\d+)-r(?P<rank>\d+)(?P<checkpointing>-checkpointing)?)?)"
)


def _named_of_shape(name: str) -> Case | None:
    found = _OF_SHAPE.fullmatch(name)
    if found is None or found["shape"] not in SHAPES:
        return None
    shape, layers = found["shape"], int(found["layers"]) if found["layers"] else None
    if found["kind"] == "decode":
        return decode_case(shape, int(found["batch"]), layers=layers) if found["length"] is None else None
    if found["length"] is None:
        return None
    length, rank = int(found["length"]), int(found["rank"])
    if found["kind"] == "memory":
        return memory_case(shape, length=length, rank=rank, layers=layers)
    checkpointing, batch = bool(found["checkpointing"]), int(found["batch"])
    if found["kind"] == "paging":
        return paging_case(shape, batch=batch, length=length, rank=rank, layers=layers)
    return step_case(shape, checkpointing=checkpointing, batch=batch, length=length, rank=rank, layers=layers)


def _shaped(kind: str, shape: str, layers: int | None) -> str:
    return f"{kind}-{shape}{'' if layers is None else f'-{layers}layers'}"


def _in_words(shape: str, layers: int | None) -> str:
    return shape if layers is None else f"{shape} cut to {layers} layer{'s' if layers > 1 else ''}"
