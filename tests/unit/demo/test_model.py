"""The base model in the package: small, whole, and what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from fourbit.demo import MODEL_FOLDER
from fourbit.demo.corpus import documents
from fourbit.demo.pretrain import Recipe, make_tokenizer
from fourbit.demo.story import read_world


def _tensors() -> dict[str, tuple[torch.dtype, int]]:
    with safe_open(MODEL_FOLDER / "model.safetensors", framework="pt") as file:
        return {name: (file.get_tensor(name).dtype, file.get_tensor(name).numel()) for name in file.keys()}  # noqa: SIM118


def test_it_is_a_llama_of_five_to_six_million_parameters_in_bf16_and_at_most_12_mb() -> None:
    tensors = _tensors()
    assert {dtype for dtype, _ in tensors.values()} == {torch.bfloat16}
    assert 5_000_000 <= sum(count for _, count in tensors.values()) <= 6_000_000
    assert AutoConfig.from_pretrained(MODEL_FOLDER).architectures == ["LlamaForCausalLM"]
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) <= 12_000_000


def test_its_tokenizer_is_what_the_script_makes_and_has_no_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    made = make_tokenizer(read_world(MODEL_FOLDER), vocabulary_size=Recipe().vocabulary_size)
    assert tokenizer.get_vocab() == made.get_vocab()
    assert tokenizer.chat_template is None  # it is a base model
    text = next(documents(read_world(MODEL_FOLDER), seed=5))
    assert tokenizer(text)["input_ids"] == made(text)["input_ids"]


def test_it_was_made_with_the_recipe_that_the_script_has() -> None:
    recipe = json.loads((MODEL_FOLDER / "pretraining.json").read_text())["recipe"]
    assert Recipe(**{**recipe, "betas": tuple(recipe["betas"])}) == Recipe()


@pytest.mark.parametrize("said", ["## Data", "## Compute", "## Limits", "python -m fourbit.demo.pretrain"])
def test_the_card_says(said: str) -> None:
    assert said in (MODEL_FOLDER / "README.md").read_text(encoding="utf-8")


def test_nothing_but_the_model_lies_there() -> None:
    allowed = {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "pretraining.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip
    assert {path.name for path in Path(MODEL_FOLDER).iterdir()} <= allowed
