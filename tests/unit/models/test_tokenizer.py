"""The tokenizer of a folder, and folders that have none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fourbit.errors import BrokenCheckpoint, NotAModel
from fourbit.models.tokenizer import load_tokenizer


def test_it_is_the_models_own(stories_model: Path) -> None:
    tokenizer = load_tokenizer(stories_model)
    assert tokenizer("Once upon a time")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(tokenizer("One day,", add_special_tokens=False)["input_ids"]) == "One day,"


def test_a_configuration_alone_is_no_tokenizer(stories_model: Path, tmp_path: Path) -> None:
    """transformers would make up one that turns every text into BOS."""
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(stories_model / name, tmp_path / name)
    with pytest.raises(NotAModel, match=r"holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\x00"])
def test_a_broken_one(content: str, stories_model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(stories_model / name, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BrokenCheckpoint, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_no_folder() -> None:
    with pytest.raises(NotAModel):
        load_tokenizer("./nowhere")
