"""Every operation in plain torch: the truth that other backends are held to, on any device."""

from fourbit.kernels.reference.absmax import dequantize_absmax, quantize_absmax
from fourbit.kernels.reference.adamw import adamw_blockwise
from fourbit.kernels.reference.attention import attention, attention_backward
from fourbit.kernels.reference.cross_entropy import linear_cross_entropy
from fourbit.kernels.reference.dense import dense
from fourbit.kernels.reference.dequantize import dequantize_blocks
from fourbit.kernels.reference.elo import elo
from fourbit.kernels.reference.linear import linear, linear_grad_input
from fourbit.kernels.reference.lora import lora_linear, lora_linear_backward
from fourbit.kernels.reference.quantize import quantize_blocks
from fourbit.kernels.reference.rms_norm import rms_norm, rms_norm_backward
from fourbit.kernels.reference.rotary import rotary
from fourbit.kernels.reference.swiglu import swiglu, swiglu_backward

__all__ = [
    "adamw_blockwise",
    "attention",
    "attention_backward",
    "dense",
    "dequantize_absmax",
    "dequantize_blocks",
    "elo",
    "linear",
    "linear_cross_entropy",
    "linear_grad_input",
    "lora_linear",
    "lora_linear_backward",
    "quantize_absmax",
    "quantize_blocks",
    "rms_norm",
    "rms_norm_backward",
    "rotary",
    "swiglu",
    "swiglu_backward",
]
