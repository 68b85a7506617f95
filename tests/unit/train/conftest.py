"""A tiny LLaMA with a tokenizer, and records to train it on: what every machine has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fourbit.train import TrainConfig

RECORDS = [
    {"instruction": f"Add {i} and {j}.", "input": "", "output": f"{i} and {j} make {i + j}{' at last' * (j % 4)}."}
    for i in range(8)
    for j in range(6)
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA of random weights in fp32, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((record["output"] for record in RECORDS), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=128
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 48 Alpaca records with answers of several lengths."""
    path = tmp_path_factory.mktemp("records") / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def config_for(tiny_model: Path, records: Path) -> Callable[..., TrainConfig]:
    """A config for a short run into a folder; give what is to be different."""

    def make(output: Path, **changes: Any) -> TrainConfig:
        plain = {
            "model": str(tiny_model),
            "data": str(records),
            "output": str(output),
            "lora_r": 8,
            "max_length": 64,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "eval_on_start": False,
            "eval_steps": 100,
            "samples": 0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        }
        return TrainConfig(**(plain | changes))

    return make


@pytest.fixture
def make_config(config_for: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., TrainConfig]:
    """The same into the folder "out" of the test."""
    return lambda **changes: config_for(tmp_path / "out", **changes)
