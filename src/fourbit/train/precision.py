"""What a run computes in, where the machine cannot do what was asked for.

float16 has the range 6e-8 to 65,504. Gradients lie below it, so the Trainer scales the loss up, and steps whose
gradients overflowed are left out while it finds a factor. That exists on GPUs, and needs adapters in float32, which is
what the scaled gradients are brought back in. Norms, softmax and cross-entropy compute in float32 in any case.
"""

from __future__ import annotations

import torch

from fourbit.train.config import TrainConfig

__all__ = ["settle_precision"]


def settle_precision(config: TrainConfig) -> tuple[TrainConfig, str | None]:
    """The config with dtypes that this machine trains in, and a sentence where they are not those asked for."""
    sentence = None
    if config.dtype == "bfloat16" and _lacks_bfloat16():
        config = config.with_(dtype="float16")
        name = torch.cuda.get_device_name()
        sentence = f"{name} has no bfloat16, so the run computes in float16 with a scaled loss instead."
    elif config.dtype == "float16" and not torch.cuda.is_available():
        config = config.with_(dtype="bfloat16")
        sentence = "float16 needs a scaled loss, which there is on GPUs alone, so the run computes in bfloat16 instead."
    if config.dtype == "float16":
        if config.adapter_dtype != "float32":
            config = config.with_(adapter_dtype="float32")
            sentence = f"{sentence or 'The loss is scaled in float16.'} The adapter is kept in float32."
        # Partial sums in float16 would overflow, or round away what the scale has saved.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return config, sentence


def _lacks_bfloat16() -> bool:
    """Whether the GPU would emulate it, many times slower."""
    return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
