"""How a peer is asked for what we do, the way its documentation does it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__all__ = [
    "BITSANDBYTES",
    "LLAMA_CPP",
    "PACKAGES",
    "TORCHAO",
    "UNSLOTH",
    "bitsandbytes_config",
    "bitsandbytes_model",
    "through_bitsandbytes",
    "torchao_nf4",
    "unsloth_model",
]

BITSANDBYTES, TORCHAO, UNSLOTH, LLAMA_CPP = "bitsandbytes", "torchao", "unsloth", "llama_cpp"
"""What a peer is imported by."""

PACKAGES = {LLAMA_CPP: "llama-cpp-python gguf"}
"""What it is installed by, where that is another name."""


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


def through_bitsandbytes(model: Any) -> Any:
    """Put bitsandbytes' layers into the place of ours, with the same codes and scales, in place and in the same memory.

    The model is then what `from_pretrained` with its config would have given, without a checkpoint.
    """
    from fourbit.nn import QuantLinear
    from fourbit.nn.convert import replace_module

    theirs_nn: Any = importlib.import_module("bitsandbytes.nn")
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, QuantLinear):
            continue
        tensors = layer.quantized.state_dict("weight")
        packed = tensors.pop("weight")
        theirs = theirs_nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight_dtype,
            compress_statistics=layer.config.double_quant,
            quant_type=layer.config.format,
            device="meta",
        )
        theirs.weight = theirs_nn.Params4bit.from_prequantized(
            data=packed, quantized_stats=tensors, requires_grad=False, device=str(packed.device), module=theirs
        )
        theirs.bias = layer.bias
        replace_module(model, name, theirs.train(layer.training))
    del model.hf_quantizer
    model.is_loaded_in_4bit = True  # what peft asks before it takes its layer for bitsandbytes
    return model


def torchao_nf4() -> Any:
    """The module with `to_nf4` and `linear_nf4`, which has moved between releases."""
    homes = ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor")
    for home in homes:
        try:
            return importlib.import_module(home)
        except ModuleNotFoundError:
            continue
    raise RuntimeError("this torchao has no NF4 tensor where it used to be")


def unsloth_model(folder: Path, *, length: int, rank: int, checkpointing: bool) -> Any:
    """A folder in bitsandbytes' layout through Unsloth, with adapters on all linear layers, as its documentation does.

    It has to be imported before transformers.
    """
    import torch
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder), max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=0,
    )
