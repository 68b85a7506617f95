"""A model left as it is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit
from fourbit.errors import AdapterMismatch, InputError, NotAModel
from fourbit.models.unquantized import load_unquantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_transformers_loads(dtype: torch.dtype, stories_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours: Any = load_unquantized(stories_model, dtype=dtype)
    theirs: Any = AutoModelForCausalLM.from_pretrained(stories_model, dtype=dtype)
    assert not ours.training
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    for (name, one), (other_name, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other_name
        assert one.dtype == dtype
        assert torch.equal(one, other)


# peft asks transformers for it when it attaches an adapter
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_with_an_adapter(stories_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = load_unquantized(stories_model, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    again: Any = load_unquantized(stories_model, adapter=tmp_path, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, adapted(ids).logits)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(NotAModel):
        load_unquantized(stories_model, adapter=tmp_path)


def test_an_adapter_for_another_model(stories_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["v_proj"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatch):
        load_unquantized(stories_model, adapter=tmp_path)


def test_a_folder_in_four_bits_is_refused(stories_model: Path, tmp_path: Path) -> None:
    fourbit.load(stories_model).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="quantized already"):
        load_unquantized(tmp_path)
