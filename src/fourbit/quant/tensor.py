"""A tensor in 4 bits: its codes, its scales, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourbit.formats import codebook, quantized_size_bytes
from fourbit.kernels import dispatch, ops
from fourbit.quant import layout
from fourbit.quant.config import QuantConfig

__all__ = ["QuantizedTensor", "levels_on", "quantize"]


_levels: dict[tuple[str, torch.device], Tensor] = {}  # not functools.cache, which torch.compile looks through


def levels_on(format: str, device: torch.device) -> Tensor:
    """[16] fp32: the levels of a format, on a device; one tensor for all weights."""
    if (format, device) not in _levels:
        with dispatch.kept_for_all():
            _levels[format, device] = torch.from_numpy(codebook(format).table.copy()).to(device)
    return _levels[format, device]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A frozen tensor of n elements in 4 bits.

    Attributes:
        packed: [ceil(n/2)] uint8, two codes to a byte, the even element in the high nibble.
        absmax: [G] scales, one per block: fp32, or uint8 under double quantization.
        nested_absmax: [ceil(G/256)] fp32 and
        nested_offset: [] fp32 under double quantization, else None.
        shape: of the tensor that was quantized.
        dtype: of the tensor that was quantized, and what `dequantize` gives by default.
        format: the name of the codebook.
        block_size: elements per scale.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    format: str = "nf4"
    block_size: int = 64

    @property
    def device(self) -> torch.device:
        """Where the codes live."""
        return self.packed.device

    @property
    def levels(self) -> Tensor:
        """[16] fp32: what each code stands for."""
        return levels_on(self.format, self.packed.device)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def config(self) -> QuantConfig:
        """The configuration that this tensor was quantized with."""
        return QuantConfig(format=self.format, block_size=self.block_size, double_quant=self.double_quant)

    def numel(self) -> int:
        """Elements of the tensor that was quantized."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return quantized_size_bytes(self.numel(), block_size=self.block_size, double_quant=self.double_quant)

    @property
    def bits_per_parameter(self) -> float:
        """`nbytes` in bits per element; 0 for an empty tensor."""
        return 8 * self.nbytes / self.numel() if self.numel() else 0.0

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Decode to fp32, fp16 or bf16; see `kernels.ops.dequantize_blocks`.

        Args:
            dtype: defaults to that of `out`, else to the original dtype.
            out: a contiguous buffer of the tensor's shape to write into.
        """
        if dtype is None:
            dtype = self.dtype if out is None else out.dtype
        return ops.dequantize_blocks(
            self.packed,
            self.absmax,
            levels=self.levels,
            block_size=self.block_size,
            shape=self.shape,
            dtype=dtype,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
            out=out,
        )

    def to(self, device: torch.device | str, *, copy: bool = False) -> QuantizedTensor:
        """The same tensor on another device; with `copy`, in memory of its own even where it is there already."""

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, copy=copy)

        return replace(
            self,
            packed=self.packed.to(device, copy=copy),
            absmax=self.absmax.to(device, copy=copy),
            nested_absmax=moved(self.nested_absmax),
            nested_offset=moved(self.nested_offset),
        )

    def state_dict(self, name: str = "weight") -> dict[str, Tensor]:
        """The tensors that a safetensors file holds for it, in bitsandbytes' layout; see `quant.layout`."""
        return layout.write(self, name)

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], name: str = "weight") -> QuantizedTensor:
        """Read what `state_dict`, or bitsandbytes, wrote.

        Raises:
            BrokenCheckpoint: a part is missing, of the wrong size or dtype, or not what any writer makes; named.
        """
        return cls(**layout.read(tensors, name))

    def __repr__(self) -> str:
        return (
            f"QuantizedTensor({self.format}, shape={list(self.shape)}, {self.bits_per_parameter:.3f} bits/parameter,"
            f" from {str(self.dtype).removeprefix('torch.')}, on {self.device})"
        )


def quantize(weight: Tensor, config: QuantConfig | None = None) -> QuantizedTensor:
    """Quantize a tensor to 4 bits.

    Args:
        weight: any shape; fp32, fp16 or bf16; finite.
        config: NF4 with double quantization by default.

    Returns:
        a new tensor on the device of `weight`; see `kernels.ops.quantize_blocks` for what is computed.

    Raises:
        UnsupportedDtype, NonFiniteWeight.
    """
    config = config or QuantConfig()
    packed, absmax = ops.quantize_blocks(weight, codebook=config.codebook, block_size=config.block_size)
    nested_absmax = nested_offset = None
    if config.double_quant:
        absmax, nested_absmax, nested_offset = ops.quantize_absmax(absmax)
    return QuantizedTensor(
        packed, absmax, nested_absmax, nested_offset, weight.shape, weight.dtype, config.format, config.block_size
    )
