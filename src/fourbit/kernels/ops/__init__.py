"""The operations: schema, checks, fake, autograd, and a typed function each. Importing this registers them."""

from fourbit.kernels.ops.absmax import dequantize_absmax, quantize_absmax
from fourbit.kernels.ops.adamw import adamw_blockwise
from fourbit.kernels.ops.attention import attention
from fourbit.kernels.ops.cross_entropy import linear_cross_entropy
from fourbit.kernels.ops.dense import dense
from fourbit.kernels.ops.dequantize import dequantize_blocks
from fourbit.kernels.ops.elo import elo
from fourbit.kernels.ops.linear import linear
from fourbit.kernels.ops.lora import lora_linear
from fourbit.kernels.ops.quantize import quantize_blocks
from fourbit.kernels.ops.rms_norm import rms_norm
from fourbit.kernels.ops.rotary import rotary
from fourbit.kernels.ops.swiglu import swiglu

__all__ = [
    "adamw_blockwise",
    "attention",
    "dense",
    "dequantize_absmax",
    "dequantize_blocks",
    "elo",
    "linear",
    "linear_cross_entropy",
    "lora_linear",
    "quantize_absmax",
    "quantize_blocks",
    "rms_norm",
    "rotary",
    "swiglu",
]
