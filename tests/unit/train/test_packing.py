"""Which models keep the examples of a packed row apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fourbit.train.packing import keeps_apart

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**settings)).to(torch.bfloat16)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"])
def test_models_that_do(name: str) -> None:
    model = build(name, **SMALL).train()
    assert keeps_apart(model)
    assert model.training


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2}),  # takes no positions
        ("MambaForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_models_that_do_not(name: str, settings: dict[str, Any]) -> None:
    assert not keeps_apart(build(name, **settings))
