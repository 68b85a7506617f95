"""Compile every Triton kernel as for a GPU, which needs none, and print what came out; run by test_triton_compiles.py.

The interpreter lets pass what the compiler refuses (types, layouts, inline PTX), so a machine without a GPU needs both.
It must run in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fourbit.kernels.triton import (
    absmax,
    adamw,
    cross_entropy,
    dequantize,
    linear,
    matvec,
    probe,
    quantize,
    rms_norm,
    rotary,
    skinny,
    swiglu,
)
from fourbit.kernels.triton.codes import LOOKUPS
from fourbit.kernels.triton.launch import EXACT

TURING, AMPERE, HOPPER = 75, 80, 90
FLOATS = {"bf16": (AMPERE, HOPPER), "fp16": (TURING, AMPERE, HOPPER), "fp32": (TURING, HOPPER)}
WEIGHT = {
    "packed": "*u8", "nested_absmax": "*fp32", "nested_offset": "*fp32", "nested_map": "*fp32", "levels": "*fp32"
}  # fmt: skip


class Kernel(NamedTuple):
    """A kernel with the types of its arguments and its constants, and the architectures to compile it for."""

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    architectures: tuple[int, ...] = (TURING, AMPERE, HOPPER)


def scales(nested: bool) -> dict[str, str]:
    return WEIGHT | {"absmax": "*u8" if nested else "*fp32"}


def kernels() -> list[Kernel]:
    table = [
        Kernel("probe", probe.double, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 32}),
        Kernel(
            "quantize_absmax",
            absmax._quantize,
            {
                "absmax": "*fp32", "offset": "*fp32", "bins": "*u8", "codes": "*u8", "nested_absmax": "*fp32",
                "count": "i32", "blocks": "i32",
            },
            {"BLOCK": 256, "ROWS": absmax.ROWS},
        ),
        Kernel(
            "dequantize_absmax",
            absmax._dequantize,
            WEIGHT | {"codes": "*u8", "absmax": "*fp32", "count": "i32"},
            {"TILE": absmax.DECODED},
        ),
    ]  # fmt: skip
    for kind, architectures in FLOATS.items():
        for block_size in (32, 64, 4096):
            rows = max(1, quantize.TILE // block_size)
            types = {"weight": f"*{kind}", "thresholds": "*fp32", "codes": "*u8", "packed": "*u8", "absmax": "*fp32"}
            table.append(
                Kernel(
                    f"quantize {kind} {block_size}", quantize._quantize, types | {"flag": "*i32", "elements": "i64"},
                    {"BLOCK": block_size, "ROWS": rows}, architectures,
                )
            )  # fmt: skip
            for nested in (False, True):
                table.append(
                    Kernel(
                        f"dequantize {kind} {block_size} {nested}", dequantize._dequantize,
                        scales(nested) | {"out": f"*{kind}", "elements": "i64"},
                        {"BLOCK": block_size, "ROWS": rows, "IS_NESTED": nested}, architectures,
                    )
                )  # fmt: skip
        table += products(kind, architectures) + modules(kind, architectures)
        moments = dict.fromkeys(adamw._update.arg_names[:-1], "fp32") | {"param": f"*{kind}", "grad": f"*{kind}"}
        moments |= dict.fromkeys(("m_codes", "v_codes", "signed_first", "unsigned_first"), "*u8") | {"count": "i32"}
        moments |= dict.fromkeys(("m_scales", "v_scales"), "*fp32")
        moments |= {f"{sign}_{table}": "*fp32" for sign in ("signed", "unsigned") for table in ("levels", "middle")}
        table.append(Kernel(f"adamw {kind}", adamw._update, moments, {"BLOCK": 256}, architectures))
    return table


def modules(kind: str, architectures: tuple[int, ...]) -> list[Kernel]:
    """The kernels of norms, gated activations, rotary embeddings and the loss, at the sizes of LLaMA-7B."""
    x = f"*{kind}"
    row = {"COLS": 4096, "TALL": 1, "WIDE": 4096}
    norm = {"x": x, "weight": x, "rows": "i32", "eps": "fp32", "offset": "fp32"}
    back = {"grad": x, "grad_x": x, "sums": "*fp32", "tiles": "i32"}
    gated = dict.fromkeys(("gate", "up", "out", "grad", "grad_gate", "grad_up"), x)
    gated |= dict.fromkeys(("gate_stride", "up_stride", "cols"), "i32")
    turned = dict.fromkeys(("q", "k", "cos", "sin", "rotated_q", "rotated_k"), x)
    turned = dict.fromkeys(rotary._rotate.arg_names, "i32") | turned
    loss = {"logits": x, "labels": "*i64", "losses": "*fp32", "vocabulary": "i32", "scale": "fp32", "cap": "fp32"}
    table = [
        Kernel(f"rms_norm {kind}", rms_norm._forward, norm | {"y": x}, row | {"ROUND": True}, architectures),
        Kernel(f"rms_norm_backward {kind}", rms_norm._backward, norm | back, row | {"WEIGHT": True}, architectures),
    ]
    for yes in (False, True):
        heads = {"HEAD": 128, "HALF": 48 if yes else 64, "INVERSE": yes, "HEADS": 16, "PAIRS": 64, "REST": 32 * yes}
        block, pieces = {"SILU": yes, "BLOCK": 1024}, {"CAPPED": yes, "GRADIENT": True, "BLOCK": 4096}
        table += [
            Kernel(f"swiglu {kind} {yes}", swiglu._forward, gated, block, architectures),
            Kernel(f"swiglu_backward {kind} {yes}", swiglu._backward, gated, block, architectures),
            Kernel(f"rotary {kind} {yes}", rotary._rotate, turned, heads, architectures),
            Kernel(f"cross_entropy {kind} {yes}", cross_entropy._to_gradients, loss, pieces, architectures),
        ]
    return table


def products(kind: str, architectures: tuple[int, ...]) -> list[Kernel]:
    """The products' kernels for an x of a type, every lookup, the tiles that `linear` takes."""
    table = []
    shared = {"IS_NESTED": True, "GROUP": 64, "GROUPS_PER_SCALE": 1}
    types = scales(True) | dict.fromkeys(("x", "addend", "y"), f"*{kind}")
    types |= dict.fromkeys(("tokens", "rows", "groups", "addend_stride"), "i32")
    for lookup in LOOKUPS:
        if lookup != "permute" or kind != "fp32":
            for block_n, block_g, even in ((4, 64, True), (16, 16, False)):
                constants = shared | {"HAS_ADDEND": even, "LOOKUP": lookup, "EVEN": even}
                constants |= {"BLOCK_N": block_n, "BLOCK_G": block_g}
                name = f"matvec {kind} {lookup} {block_n}"
                table.append(Kernel(name, matvec.matvec, types, constants, architectures))
        if kind != "fp32":
            for block_m, splits in ((16, 4), (64, 1)):
                constants = shared | {"HAS_ADDEND": splits == 1, "LOOKUP": lookup, "SPLITS": splits}
                constants |= {"BLOCK_N": 128, "BLOCK_M": block_m}
                arguments = types | {"y": "*fp32" if splits > 1 else f"*{kind}"}
                tensor_cores = tuple(one for one in architectures if one >= 10 * linear.TENSOR_CORES[0])
                name = f"skinny {kind} {lookup} {block_m}"
                table.append(Kernel(name, skinny.skinny, arguments, constants, tensor_cores))
    sums = {
        "sums": "*fp32",
        "addend": f"*{kind}",
        "y": f"*{kind}",
        "count": "i32",
        "rows": "i32",
        "addend_stride": "i32",
    }
    constants = {"SPLITS": 4, "HAS_ADDEND": True, "TILE": 1024}
    table.append(Kernel(f"add_splits {kind}", skinny.add_splits, sums, constants, architectures))
    return table


def compile_for(kernel: Kernel, architecture: int) -> dict[str, Any]:
    """What the tests look at: instructions of the PTX, and the bytes of shared memory that a program takes."""
    names = kernel.function.arg_names
    signature = {name: "constexpr" if name in kernel.constants else kernel.types[name] for name in names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in ("rows", "groups")]
    source = ASTSource(
        fn=kernel.function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in kernel.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4, **EXACT})
    ptx = compiled.asm["ptx"]
    found = ("ftz", "fma.rn", "div.rn", "div.full", "div.approx", "wgmma", "ld.global.v4", "cp.async")
    contracted = re.findall(r"fma\.rn\.f32", ptx)
    return {"has": [one for one in found if one in ptx], "fma": len(contracted), "shared": compiled.metadata.shared}


def main(wanted: list[str]) -> None:
    """Those whose name and architecture are given, or all."""
    results = {}
    for kernel in kernels():
        for architecture in kernel.architectures:
            name = f"{kernel.name} sm_{architecture}"
            if not wanted or name in wanted:
                results[name] = compile_for(kernel, architecture)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
