"""Triton: products with a quantized weight, and which of three ways a shape takes.

    matvec   one token: `matvec`, bound by reading the 4 bits
    skinny   2 to 64 tokens of 16 bits: `skinny`, tensor cores fed straight from the 4 bits
    decoded  more: W is decoded (`dequantize`) into a buffer and meets x in cuBLAS

Decoding costs 2.5 bytes of traffic an element and its reading 2 more, once per product; from some number of tokens on
that is little beside the product, which cuBLAS does as fast as the tensor cores go. The buffer is torch's to lend: the
caching allocator hands the same memory from layer to layer, to each stream and each captured graph its own, and to the
activations in between.

The transposed product of a backward pass, dX = dY W, is `decoded` at every size: it is taken by training, in which
tokens are many.

`matvec` and `skinny` walk a weight in groups, runs of 32 or 64 elements that lie in one row and in one block; a weight
whose rows do not divide so is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from fourbit.kernels.parts import refusal
from fourbit.kernels.triton.codes import LOOKUPS
from fourbit.kernels.triton.dequantize import dequantize_blocks
from fourbit.kernels.triton.launch import EXACT, capability, guard, interpreted, multiprocessors
from fourbit.kernels.triton.matvec import matvec
from fourbit.kernels.triton.skinny import add_splits, skinny
from fourbit.kernels.triton.weight import nested_map

__all__ = [
    "Way",
    "accepts_linear",
    "accepts_linear_grad_input",
    "choose",
    "decode",
    "describe",
    "linear",
    "linear_grad_input",
    "multiply",
    "variants",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_GROUP, SMALLEST_GROUP = 64, 32
SKINNY_TOKENS = 64
"""The most tokens that `skinny` takes; not measured yet: beyond, its programs read W more than once."""
MATVEC_TOKENS = 8
"""The most tokens that `matvec` takes, one after the other, where there are no tensor cores for their type: it reads
half a byte an element for each, and `decoded` 4.5 for all."""
TENSOR_CORES = (8, 0)
"""The compute capability from which Triton has tensor cores for fp16 and bf16 both."""

Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, int]
"""packed, absmax, nested_absmax, nested_offset, levels, block_size: as the operations' schemas have them."""


@dataclass(frozen=True)
class Way:
    """How a product runs: `matvec`, `skinny` or `decoded`, and how the first two look codes up (see `codes`)."""

    name: str
    lookup: str = ""


def choose(x: Tensor, weight: Weight, out_features: int) -> Way:
    """The way for a product of x [..., K] with a weight [N, K], by shape, dtype and device."""
    features = x.shape[-1]
    tokens = x.numel() // features if features else 0
    if not tokens or not out_features or _group(features, weight[-1]) < SMALLEST_GROUP or weight[0].data_ptr() % 16:
        return Way("decoded")
    tensor_cores = x.dtype != torch.float32 and capability(x.device) >= TENSOR_CORES
    if tokens <= (1 if tensor_cores else MATVEC_TOKENS):
        return Way("matvec", "gather")
    if tensor_cores and tokens <= SKINNY_TOKENS:
        return Way("skinny", "permute" if _has_ptx() else "gather")
    return Way("decoded")


def describe() -> str:
    """The table of `choose`, in words."""
    return (
        f"1 token by matvec, to {SKINNY_TOKENS} of 16 bits by skinny (tensor cores, from compute capability"
        f" {TENSOR_CORES[0]}.{TENSOR_CORES[1]}; below it and in fp32 to {MATVEC_TOKENS} by matvec), more decoded into a"
        " buffer for cuBLAS"
    )


def _group(features: int, block_size: int) -> int:
    """Elements of a group: the longest run that rows and blocks both consist of."""
    return math.gcd(features, block_size, LARGEST_GROUP)


def _has_ptx() -> bool:
    return not interpreted() and torch.version.hip is None


def accepts_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> str | None:
    """x of fp32, fp16 or bf16."""
    if x.dtype not in DTYPES:
        return f"it computes in fp32, fp16 or bf16, not {x.dtype}"
    elements = out_features * x.shape[-1]
    return refusal(packed, absmax, nested_absmax, nested_offset, levels, block_size, elements)


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """See `kernels.ops.linear.linear`."""
    weight = (packed, absmax, nested_absmax, nested_offset, levels, block_size)
    return multiply(x, weight, out_features, bias)


def accepts_linear_grad_input(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    in_features: int,
) -> str | None:
    """A gradient of fp32, fp16 or bf16."""
    return accepts_linear(grad, packed, absmax, nested_absmax, nested_offset, levels, block_size, in_features, None)


def linear_grad_input(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    levels: Tensor,
    block_size: int,
    in_features: int,
) -> Tensor:
    """The gradient that reaches the input of `linear`: dX = dY W, [..., N] to [..., K]."""
    weight = (packed, absmax, nested_absmax, nested_offset, levels, block_size)
    return grad @ decode(weight, grad.shape[-1], in_features, grad.dtype)


def decode(weight: Weight, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """W [rows, columns] in a buffer that goes back to the allocator when the caller lets go of it."""
    out = weight[0].new_empty((rows, columns), dtype=dtype)
    dequantize_blocks(*weight, out)
    return out


def multiply(x: Tensor, weight: Weight, out_features: int, addend: Tensor | None, *, way: Way | None = None) -> Tensor:
    """y = x W^T + addend.

    Args:
        x: [..., K]; fp32, fp16 or bf16.
        weight: W [N, K]; see `Weight`.
        out_features: N.
        addend: [N], a bias, or [..., N], contiguous and in the dtype of x, which may be overwritten by the result.
        way: how; by default what `choose` says.
    """
    way = way or choose(x, weight, out_features)
    features = x.shape[-1]
    if way.name == "decoded":
        matrix = decode(weight, out_features, features, x.dtype)
        if addend is None or addend.dim() == 1:
            return torch.nn.functional.linear(x, matrix, None if addend is None else addend.to(x.dtype))
        addend.view(-1, out_features).addmm_(x.reshape(-1, features), matrix.t())
        return addend
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    if addend is not None:
        addend = addend.to(x.dtype).contiguous()
    with guard(x):
        (_matvec if way.name == "matvec" else _skinny)(x, weight, addend, y, way.lookup)
    return y


def _arguments(weight: Weight, features: int) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """What both kernels are told of a weight: the tensors after x, and constants."""
    packed, absmax, nested_absmax, nested_offset, levels, block_size = weight
    nested = nested_absmax is not None
    group = _group(features, block_size)
    if group < SMALLEST_GROUP or packed.data_ptr() % 4:
        raise ValueError(f"Rows of {features} elements at block size {block_size} are not made of groups; decode them.")
    tensors = (packed, absmax, nested_absmax, nested_offset, nested_map(packed.device) if nested else None, levels)
    return tensors, {"GROUP": group, "GROUPS_PER_SCALE": block_size // group, "IS_NESTED": nested, **EXACT}


def _stride(addend: Tensor | None, rows: int) -> int:
    """From one token's addend to the next one's: a bias serves all."""
    return 0 if addend is None or addend.dim() == 1 else rows


def _matvec(x: Tensor, weight: Weight, addend: Tensor | None, y: Tensor, lookup: str) -> None:
    features, rows = x.shape[-1], y.shape[-1]
    tensors, constants = _arguments(weight, features)
    groups = features // constants["GROUP"]
    if lookup == "permute" and x.dtype == torch.float32:
        raise ValueError("`permute` finds 16-bit levels; fp32 takes another lookup.")
    # Tall tiles use each x they read for more rows; short ones make more programs, some four per multiprocessor.
    block_n = 16
    while block_n > 4 and triton.cdiv(rows, block_n) < 4 * multiprocessors(x.device):
        block_n //= 2
    block_g = 1024 // constants["GROUP"] * (16 // block_n)
    block_g = min(block_g, triton.next_power_of_2(groups))
    matvec[(triton.cdiv(rows, block_n), x.numel() // features)](
        x, *tensors, addend, y, rows, groups, _stride(addend, rows), HAS_ADDEND=addend is not None, LOOKUP=lookup,
        EVEN=groups % block_g == 0, BLOCK_N=block_n, BLOCK_G=block_g, num_warps=4, **constants,
    )  # fmt: skip


def _skinny(x: Tensor, weight: Weight, addend: Tensor | None, y: Tensor, lookup: str) -> None:
    features, rows = x.shape[-1], y.shape[-1]
    tokens = x.numel() // features
    tensors, constants = _arguments(weight, features)
    groups = features // constants["GROUP"]
    if x.dtype == torch.float32:
        raise ValueError("The tensor cores would round fp32 to fewer bits; it takes `matvec` or is decoded.")
    block_n, block_m = (64 if interpreted() else 128), min(64, max(16, triton.next_power_of_2(tokens)))
    tiles = triton.cdiv(rows, block_n) * triton.cdiv(tokens, block_m)
    splits = _splits(tiles, groups, 4 * multiprocessors(x.device))
    has_addend, stride = addend is not None, _stride(addend, rows)
    sums = y if splits == 1 else y.new_empty((splits, tokens, rows), dtype=torch.float32)
    skinny[(triton.cdiv(rows, block_n), splits, triton.cdiv(tokens, block_m))](
        x, *tensors, addend, sums, tokens, rows, groups, stride, HAS_ADDEND=has_addend and splits == 1, LOOKUP=lookup,
        SPLITS=splits, BLOCK_N=block_n, BLOCK_M=block_m, num_warps=4, num_stages=4, **constants,
    )  # fmt: skip
    if splits > 1:
        count, tile = tokens * rows, 1024
        add_splits[(triton.cdiv(count, tile),)](
            sums, addend, y, count, rows, stride, SPLITS=splits, HAS_ADDEND=has_addend, TILE=tile, **EXACT
        )


def _splits(tiles: int, groups: int, programs: int) -> int:
    """Into how many parts to cut the groups for about that many programs: a power of two, each part of 8 or more."""
    splits = 1
    while splits < 16 and tiles * splits < programs and groups >= splits * 2 * 8:
        splits *= 2
    return splits


def variants() -> dict[str, dict[str, Callable[..., Any]]]:
    """Operation -> variant -> function with the schema's positional arguments; see `kernels.triton.variants`."""
    ways = [Way("decoded"), *(Way(name, lookup) for name in ("matvec", "skinny") for lookup in LOOKUPS)]
    usable = [way for way in ways if way.lookup != "permute" or _has_ptx()]
    return {"linear": {f"{way.name} {way.lookup}".strip(): partial(_by, way) for way in usable}}


def _by(way: Way, x: Tensor, *arguments: Any) -> Tensor:
    """`linear`, in a way of the caller's choice."""
    *weight, out_features, bias = arguments
    return multiply(x, tuple(weight), out_features, bias, way=way)
