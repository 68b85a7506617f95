"""A token through all layers in one call, where Python cannot call it: the bits of the kernels called one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.formats import NF4
from fourbit.kernels.native.attention import _Arguments
from fourbit.kernels.native.decoder import _Decoder, _Layer
from fourbit.kernels.native.library import DTYPES
from tests.parity.test_replay import Check, Record, Replay, random_weight, record, replay

__all__ = ["replay"]  # the fixture

BATCH, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, CAPACITY, PLACE, THREADS = 2, 96, 160, 6, 2, 16, 5, 3, 2
EPS, SCALE, LAYERS = 1e-5, 0.25, 2
WIDTHS = {
    "q": (HEADS * HEAD, HIDDEN),
    "k": (KV_HEADS * HEAD, HIDDEN),
    "v": (KV_HEADS * HEAD, HIDDEN),
    "out": (HIDDEN, HEADS * HEAD),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}


@dataclass
class Product:
    """A layer in 4 bits; q has a bias, down an adapter, and v scales of its own kind."""

    name: str
    generator: torch.Generator
    dtype: torch.dtype
    weight: Record = field(init=False)
    bias: Tensor | None = None
    adapter: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        rows, cols = WIDTHS[self.name]
        parts = random_weight(self.generator, rows * cols, 32, nested=self.name != "v", magnitude=0.2)
        self.weight = record(parts, torch.from_numpy(NF4.table), rows=rows, cols=cols, block_size=32)
        if self.name == "q":
            self.bias = torch.randn(rows, generator=self.generator).to(self.dtype)
        if self.name == "down":
            a, b = torch.randn(4, cols, generator=self.generator), torch.randn(rows, 4, generator=self.generator)
            self.adapter = a * 0.1, b * 0.1

    def fields(self) -> dict[str, Any]:
        found = {f"weight.{name}": value for name, value in self.weight.fields.items()} | {"bias": self.bias}
        if self.adapter is not None:
            a, b = self.adapter
            found |= {"a": a, "b": b, "rank": 4, "adapter_dtype": DTYPES[a.dtype], "scaling": 0.5}
        return found


class OneByOne:
    """The layers of a decoder by one call after the other; `place` tokens are in its cache."""

    def __init__(self, replay: Replay, dtype: torch.dtype) -> None:
        self.replay, self.dtype, self.code = replay, dtype, DTYPES[dtype]

    def call(self, kernel: str, *arguments: Any) -> None:
        self.replay([Check(kernel, (*arguments, THREADS), lambda: None)])

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty_like(x)
        self.call("rms_norm", x, weight, self.code, x.numel() // weight.numel(), weight.numel(), EPS, 0.0, 0, y)
        return y

    def multiply(self, product: Product, x: Tensor) -> Tensor:
        rows, cols = WIDTHS[product.name]
        y = torch.empty(BATCH, rows, dtype=self.dtype)
        self.call("linear", product.weight, x, self.code, BATCH, product.bias, y)
        if product.adapter is not None:
            a, b = product.adapter
            xa = torch.empty(BATCH, 4, dtype=self.dtype)
            self.call("lora_add", x, self.code, BATCH, cols, a, b, DTYPES[a.dtype], 4, rows, 0.5, xa, y)
        return y

    def rotate(self, x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        strides = torch.tensor([heads * HEAD, HEAD, heads * HEAD])
        y = torch.empty_like(x)
        self.call("rotary", x, strides, cos, sin, 0, self.code, BATCH, heads, 1, HEAD, HEAD, 0, y, strides)
        return y

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        out, lse = torch.empty(BATCH, HEADS * HEAD, dtype=self.dtype), torch.empty(BATCH, HEADS)
        cached = CAPACITY * HEAD
        sizes = {"batch": BATCH, "heads": HEADS, "kv_heads": KV_HEADS, "q_length": 1, "k_length": PLACE + 1}
        fields: dict[str, Any] = {"dtype": self.code, "mask_dtype": 3, "scale": SCALE, "qk_size": HEAD, "v_size": HEAD}
        fields |= sizes | {"lse": lse, "mask.data": visible, "mask.batch_stride": CAPACITY}
        for name, data in {"q": q, "out": out}.items():
            fields |= {f"{name}.data": data, f"{name}.batch_stride": HEADS * HEAD, f"{name}.head_stride": HEAD}
            fields |= {f"{name}.row_stride": HEADS * HEAD}
        for name, data in {"k": keys, "v": values}.items():
            fields |= {f"{name}.data": data, f"{name}.batch_stride": KV_HEADS * cached}
            fields |= {f"{name}.head_stride": cached, f"{name}.row_stride": HEAD}
        needed = torch.zeros(1, dtype=torch.int64)
        self.call("attention_workspace", Record(_Arguments, fields), 0, needed)
        fields["workspace"] = torch.empty(int(needed), dtype=torch.uint8)
        self.call("attention", Record(_Arguments, fields))
        return out

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        self.call("swiglu", gate, INNER, up, INNER, self.code, BATCH, INNER, 0, out)
        return out


@dataclass
class Layer:
    """The weights of one, and its cache with `PLACE` tokens in it."""

    generator: torch.Generator
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.products = {name: Product(name, self.generator, self.dtype) for name in WIDTHS}
        sizes = {"norm": HIDDEN, "mlp_norm": HIDDEN, "q_norm": HEAD}  # k has none
        self.norms = {name: (1 + 0.1 * self.random(size)).to(self.dtype) for name, size in sizes.items()}
        self.keys, self.values = (self.random(BATCH, KV_HEADS, CAPACITY, HEAD).to(self.dtype) for _ in range(2))

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def fields(self) -> dict[str, Any]:
        found: dict[str, Any] = {"keys": self.keys.clone(), "values": self.values.clone()}
        for name, weight in self.norms.items():
            found |= {f"{name}.weight": weight, f"{name}.eps": EPS}
        for name, product in self.products.items():
            found |= {f"{name}.{key}": value for key, value in product.fields().items()}
        return found

    def run(self, by: OneByOne, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        normed = by.norm(x, self.norms["norm"])
        q, k, v = (by.multiply(self.products[name], normed) for name in ("q", "k", "v"))
        q = by.rotate(by.norm(q, self.norms["q_norm"]), HEADS, cos, sin)
        self.keys[:, :, PLACE] = by.rotate(k, KV_HEADS, cos, sin).view(BATCH, KV_HEADS, HEAD)
        self.values[:, :, PLACE] = v.view(BATCH, KV_HEADS, HEAD)
        x = x + by.multiply(self.products["out"], by.attend(q, self.keys, self.values, visible))
        normed = by.norm(x, self.norms["mlp_norm"])
        gate, up = (by.multiply(self.products[name], normed) for name in ("gate", "up"))
        return x + by.multiply(self.products["down"], by.swiglu(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_decoder_step(replay: Replay, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    layers = [Layer(generator, dtype) for _ in range(LAYERS)]
    given, weight, cos, sin = (
        torch.randn(size, generator=generator).to(dtype) for size in ((BATCH, HIDDEN), (HIDDEN,), (HEAD,), (HEAD,))
    )
    visible = torch.ones(BATCH, CAPACITY, dtype=torch.bool)
    visible[1, 0] = False
    fields: dict[str, Any] = {"dtype": DTYPES[dtype], "scale": SCALE, "layers": LAYERS, "batch": BATCH}
    fields |= {"hidden": HIDDEN, "inner": INNER, "heads": HEADS, "kv_heads": KV_HEADS, "head": HEAD, "rotated": HEAD}
    fields |= {"capacity": CAPACITY, "norm.weight": weight, "norm.eps": EPS, "visible": visible}
    parts = {f"{index}.{key}": value for index, layer in enumerate(layers) for key, value in layer.fields().items()}
    fields["layer"] = Record(_Layer * LAYERS, parts)
    needed, x = torch.zeros(1, dtype=torch.int64), given.clone()
    replay([Check("decoder_workspace", (Record(_Decoder, fields), needed, THREADS), lambda: None)])
    fields["workspace"] = torch.empty(int(needed), dtype=torch.uint8)
    replay([Check("decoder_step", (Record(_Decoder, fields), PLACE, cos, sin, 0, x, THREADS), lambda: None)])

    expected = given
    by = OneByOne(replay, dtype)
    for layer in layers:
        expected = layer.run(by, expected, cos, sin, visible)
    expected = by.norm(expected, weight)
    assert expected.isfinite().all()
    assert torch.equal(x, expected)
    for index, layer in enumerate(layers):
        assert torch.equal(parts[f"{index}.keys"], layer.keys)
        assert torch.equal(parts[f"{index}.values"], layer.values)
