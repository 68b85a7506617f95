"""How a peer is asked for what we do, the way its documentation does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["BITSANDBYTES", "bitsandbytes_config", "bitsandbytes_model"]

BITSANDBYTES = "bitsandbytes"


def bitsandbytes_config() -> Any:
    """NF4 with double quantization, products in bf16."""
    import torch
    import transformers

    config: Any = transformers.BitsAndBytesConfig
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def bitsandbytes_model(folder: Path) -> Any:
    """A 16-bit folder through transformers into bitsandbytes' layers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=bitsandbytes_config())
