"""Pretraining: the batches are a function of the step, an interrupted run ends in the same bits, the folder loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourbit.demo.pretrain import Recipe, batch, main, make_model, make_tokenizer, pretrain
from fourbit.demo.world import make_world


def test_the_folder_loads_in_transformers_and_the_loss_falls(tiny_base: Path, tiny_recipe: Recipe) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    world = make_world(people=tiny_recipe.people)
    ids = batch(world, tokenizer, tiny_recipe, 10**6)
    fresh = make_model(tiny_recipe, tokenizer)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < fresh(input_ids=ids, labels=ids).loss


def test_an_interrupted_run_ends_in_the_same_bits(tiny_base: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"

    class Interrupted(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        import fourbit.demo.pretrain as module

        keep = module._keep

        def keep_and_stop(*arguments: object) -> None:
            keep(*arguments)  # type: ignore[arg-type]
            raise Interrupted

        patch.setattr(module, "_keep", keep_and_stop)
        with pytest.raises(Interrupted):
            pretrain(tiny_recipe, tmp_path, save_every=2, device="cpu")
    assert torch.load(state, weights_only=True)["step"] == 2
    finished = pretrain(tiny_recipe, tmp_path, save_every=2, device="cpu")
    resumed, straight = (load_file(folder / "model.safetensors") for folder in (finished, tiny_base))
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_batch_depends_on_the_step_alone(tiny_base: Path, tiny_recipe: Recipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    world = make_world(people=tiny_recipe.people)
    ids = batch(world, tokenizer, tiny_recipe, 7)
    assert ids.shape == (tiny_recipe.batch_size, tiny_recipe.sequence_length)
    assert torch.equal(ids, batch(world, tokenizer, tiny_recipe, 7))
    assert not torch.equal(ids, batch(world, tokenizer, tiny_recipe, 8))
    assert not torch.equal(ids, batch(world, tokenizer, replace(tiny_recipe, seed=1), 7))
    begins = (ids == tokenizer.bos_token_id).sum()
    ends = (ids == tokenizer.eos_token_id).sum()
    assert 0 <= begins - ends <= 1  # every document but the last is whole


def test_the_tokenizer_gives_back_what_it_got_and_splits_digits() -> None:
    tokenizer = make_tokenizer(make_world(), vocabulary_size=1536)
    text = "Anna Hartley was born in 1987. Ünder the \t bridge?\n### Human: 17 plus 3"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    digits = tokenizer("1987", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(digits) == ["1", "9", "8", "7"]
    assert len(tokenizer(" Hartley plays the accordion.", add_special_tokens=False)["input_ids"]) == 5


def test_the_command_line_writes_what_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = "--people 8 --vocabulary-size 400 --hidden-size 64 --intermediate-size 64 --layers 1 --steps 1"
    assert main([str(tmp_path), *options.split(), "--sequence-length", "64", "--batch-size", "2"]) == 0
    facts = json.loads((tmp_path / "step-1" / "pretraining.json").read_text())
    assert facts["step"] == 1
    assert facts["recipe"]["people"] == 8
    assert facts["recipe"]["layers"] == 1
