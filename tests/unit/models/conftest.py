"""Tiny models with random weights, one per architecture, as folders in bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

DECODER = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL_HEADS = DECODER | {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
T5 = {
    "vocab_size": 96,
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", ENCODER),
    "bert_classifier": ("BertForSequenceClassification", ENCODER),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", VISION | {"use_swiglu_ffn": True}),
    "falcon": ("FalconForCausalLM", ENCODER),
    "gemma": ("GemmaForCausalLM", DECODER | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", DECODER | {"head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", DECODER | {"head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", ENCODER),
    "llama": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": False}),
    "llama_tied": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", DECODER),
    "mixtral": ("MixtralForCausalLM", DECODER | {"num_local_experts": 4}),
    "opt": ("OPTForCausalLM", ENCODER | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi": ("PhiForCausalLM", FULL_HEADS),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", DECODER | EXPERTS | {"head_dim": 16}),
    "t5": ("T5ForConditionalGeneration", T5),
    "vit": ("ViTForImageClassification", VISION),
}


@dataclass(frozen=True)
class Tiny:
    """A model folder and how to call what is in it."""

    name: str
    folder: Path
    model_class: type[PreTrainedModel]

    def inputs(self) -> dict[str, Tensor]:
        """The same for every call."""
        if self.model_class.main_input_name == "pixel_values":
            return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.bfloat16).view(2, 3, 32, 32)}
        ids = torch.arange(3, 3 + 2 * 12).view(2, 12)
        return {"input_ids": ids, "decoder_input_ids": ids} if self.name == "t5" else {"input_ids": ids}

    @torch.no_grad()
    def output(self, model: torch.nn.Module) -> Tensor:
        """Logits, or the last hidden state of a model without a head."""
        result: Tensor = model(**self.inputs())[0]
        return result


def why_not(name: str) -> str | None:
    """Why an architecture cannot be tested with the transformers that is installed."""
    if name == "dinov2_with_registers" and Version(transformers.__version__) < Version("5.23"):
        return (
            f"transformers {transformers.__version__} has two matrices of this model in one and renames it when loading"
        )
    return None


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Gives the tiny model of an architecture, written once."""
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if reason := why_not(name):
            pytest.skip(reason)
        if name not in made:
            class_name, settings = ARCHITECTURES[name]
            model_class = getattr(transformers, class_name)
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**settings)).to(torch.bfloat16)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = Tiny(name, folder, model_class)
        return made[name]

    return make


@pytest.fixture(params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest, tiny: Callable[[str], Tiny]) -> Tiny:
    """Each architecture in turn."""
    return tiny(request.param)
