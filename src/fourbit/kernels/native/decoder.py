"""Native: one token of every row through all layers of a decoder, in one call. csrc/kernels/decoder.cpp.

No operation of its own: the kernels that the operations have, one after the other, without Python between them. Whoever
calls it must have chosen those kernels for every step (`accepts_product` says whether a product is one of them).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.kernels.native import linear as base
from fourbit.kernels.native import lora
from fourbit.kernels.native.library import DTYPES, I32, I64, POINTER, bind, check, threads
from fourbit.kernels.native.swiglu import ACTIVATIONS
from fourbit.kernels.native.weight import Weight, point_at

__all__ = ["Decoder", "Layer", "Norm", "Product", "Shape"]

_F32 = ctypes.c_float


@dataclass(frozen=True, slots=True)
class Norm:
    """The arguments of `rms_norm` beside x."""

    weight: Tensor
    eps: float
    offset: float
    round_first: bool


@dataclass(frozen=True, slots=True)
class Product:
    """The arguments of `linear` beside x, and an adapter: A [R, K], B [N, R] and its scaling."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    levels: Tensor
    block_size: int
    rows: int
    cols: int
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor, float] | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer is made of; norms of heads where it has them."""

    norm: Norm
    mlp_norm: Norm
    q_norm: Norm | None
    k_norm: Norm | None
    q: Product
    k: Product
    v: Product
    out: Product
    gate: Product
    up: Product
    down: Product


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes: `rotated` elements of each head of `head`; `inner` of the MLP; `capacity` tokens of a cache."""

    batch: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    rotated: int
    capacity: int


class _Product(ctypes.Structure):
    """Mirrors FbProduct."""

    _fields_ = (
        ("weight", Weight),
        *((name, POINTER) for name in ("bias", "a", "b")),
        ("rank", I64),
        ("adapter_dtype", I32),
        ("scaling", _F32),
        ("many", I32),
    )


class _Norm(ctypes.Structure):
    """Mirrors FbNorm."""

    _fields_ = (("weight", POINTER), ("eps", _F32), ("offset", _F32), ("round_first", I32))


_NORMS = ("norm", "mlp_norm", "q_norm", "k_norm")
_PRODUCTS = ("q", "k", "v", "out", "gate", "up", "down")


class _Layer(ctypes.Structure):
    """Mirrors FbDecoderLayer."""

    _fields_ = (
        *((name, _Norm) for name in _NORMS),
        *((name, _Product) for name in _PRODUCTS),
        ("keys", POINTER),
        ("values", POINTER),
    )


class _Decoder(ctypes.Structure):
    """Mirrors FbDecoder. It holds addresses, so the tensors must outlive it."""

    _fields_ = (
        ("dtype", I32),
        ("activation", I32),
        ("scale", _F32),
        *((name, I64) for name in ("layers", *Shape.__slots__)),
        ("layer", ctypes.POINTER(_Layer)),
        ("norm", _Norm),
        ("visible", POINTER),
        ("workspace", POINTER),
    )


_measure = bind("fb_decoder_workspace", [ctypes.POINTER(_Decoder), ctypes.POINTER(I64), I32])
_step = bind("fb_decoder_step", [ctypes.POINTER(_Decoder), I64, POINTER, POINTER, I64, POINTER, I32])


class Decoder:
    """A decoder over a cache, ready to be called for token after token.

    Args:
        shape: of all.
        layers, norm: the weights, all of `dtype` but codes, scales and adapters.
        caches: keys and values of each layer, [B, H, capacity, D] without gaps.
        visible: [B, capacity] bool, which tokens are seen; None for all.
        dtype: of what is computed.
        activation: as `swiglu` takes it.
        scale: of attention.

    Raises:
        ValueError: a part that the kernels do not take; says which.
    """

    def __init__(
        self,
        shape: Shape,
        layers: Sequence[Layer],
        norm: Norm,
        caches: Sequence[tuple[Tensor, Tensor]],
        visible: Tensor | None,
        *,
        dtype: torch.dtype,
        activation: str,
        scale: float,
    ) -> None:
        self._kept: list[object] = [layers, norm, caches, visible]
        self._threads, self._dtype = threads(), dtype
        self._layers = (_Layer * len(layers))(*(self._layer(each, shape.batch) for each in layers))
        for layer, (keys, values) in zip(self._layers, caches, strict=True):
            expected = shape.batch, shape.kv_heads, shape.capacity, shape.head
            if any(x.shape != expected or x.dtype != dtype or not x.is_contiguous() for x in (keys, values)):
                raise ValueError("its keys and values are not laid out as those of one head after the other")
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        self._decoder = _Decoder(
            dtype=DTYPES[dtype], activation=ACTIVATIONS[activation], scale=scale, layers=len(layers),
            layer=self._layers, norm=self._norm(norm), visible=None if visible is None else visible.data_ptr(),
            **{name: getattr(shape, name) for name in Shape.__slots__},
        )  # fmt: skip
        needed = I64()
        check(_measure(self._decoder, ctypes.byref(needed), self._threads), "fb_decoder_workspace")
        workspace = torch.empty(needed.value + 63, dtype=torch.uint8)
        self._kept.append(workspace)
        self._decoder.workspace = -(-workspace.data_ptr() // 64) * 64

    def __call__(self, x: Tensor, place: int, cos: Tensor, sin: Tensor) -> None:
        """Take x [B, 1, hidden], one token of each row, through all layers and the last norm, in place.

        Args:
            x: without gaps; holds the result afterwards.
            place: which token it is in the cache.
            cos, sin: [B or 1, 1, rotated].
        """
        cos, sin = cos.contiguous(), sin.contiguous()
        stride = cos.stride(0) if cos.shape[0] > 1 else 0
        status = _step(self._decoder, place, cos.data_ptr(), sin.data_ptr(), stride, x.data_ptr(), self._threads)
        check(status, "fb_decoder_step")

    def _layer(self, layer: Layer, rows: int) -> _Layer:
        norms = {name: self._norm(getattr(layer, name)) for name in _NORMS}
        return _Layer(**norms, **{name: self._product(getattr(layer, name), rows) for name in _PRODUCTS})

    def _norm(self, norm: Norm | None) -> _Norm:
        if norm is None:
            return _Norm()
        if norm.weight.dtype != self._dtype or not norm.weight.is_contiguous():
            raise ValueError("a norm's weight is of another dtype")
        return _Norm(norm.weight.data_ptr(), norm.eps, norm.offset, norm.round_first)

    def _product(self, product: Product, rows: int) -> _Product:
        kernel = base.kernel_for(rows, product.cols, self._dtype)
        bias = product.bias
        if kernel is None or (bias is not None and (bias.dtype != self._dtype or not bias.is_contiguous())):
            raise ValueError(f"{rows} rows of {product.cols} are not multiplied straight from 4 bits")
        weight = point_at(
            product.packed, product.absmax, product.nested_absmax, product.nested_offset, product.levels,
            product.block_size, product.rows, product.cols,
        )  # fmt: skip
        found = _Product(weight=weight, bias=None if bias is None else bias.data_ptr(), many=base.is_for_many(kernel))
        if product.adapter is not None:
            a, b, scaling = product.adapter
            if not lora.are_few(rows, a, b):
                raise ValueError(f"the adapter's share of {rows} rows is added by a matrix product")
            found.a, found.b, found.rank, found.scaling = a.data_ptr(), b.data_ptr(), a.shape[0], scaling
            found.adapter_dtype = DTYPES[a.dtype]
        return found
