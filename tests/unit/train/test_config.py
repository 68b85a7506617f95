"""One config as Python, YAML and key=value, and what is said where it makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.quant import QuantConfig
from fourbit.train import TrainConfig
from fourbit.train.values import parse_pairs, read_yaml

NEEDED = {"model": "m", "data": "d", "output": "o"}


def test_defaults_are_guanacos() -> None:
    config = TrainConfig(**NEEDED)
    assert (config.lora_r, config.lora_alpha, config.target_modules) == (64, 16, "all-linear")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16
    assert (config.learning_rate, config.adam_beta2, config.weight_decay) == (2e-4, 0.999, 0)
    assert (config.max_grad_norm, config.warmup_steps) == (0.3, 0.03)
    assert config.lr_scheduler_type == "constant_with_warmup"  # "constant" would ignore the warm-up
    assert (config.seed, config.data_seed, config.group_by_length) == (0, 42, True)


def test_yaml_gives_the_config_again(tmp_path: Path) -> None:
    config = TrainConfig(
        **NEEDED, learning_rate=1e-5, target_modules=["q_proj"], packing=True, extra={"neftune_noise_alpha": 5.0}
    )
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert TrainConfig.load(path) == config
    assert set(read_yaml(path)) == {*NEEDED, "learning_rate", "target_modules", "packing", "neftune_noise_alpha"}


def test_keys_of_the_command_line_win(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\noutput: o\nmax_steps: 5\nwarmup_steps: 10\n")
    config = TrainConfig.load(path, parse_pairs(["max_steps=7", "learning_rate=1e-4", "warmup_ratio=0.1"]))
    assert (config.max_steps, config.learning_rate, config.warmup_steps) == (7, 1e-4, 0.1)


def test_pairs_are_read_as_yaml() -> None:
    given = parse_pairs(["a=1", "b=true", "c=[x, y]", "d=null", "e=x=y", "f="])
    assert given == {"a": 1, "b": True, "c": ["x", "y"], "d": None, "e": "x=y", "f": None}


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", ".0002"])
def test_numbers_that_yaml_takes_for_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndata: d\noutput: o\nlearning_rate: {text}\n")
    assert TrainConfig.load(path).learning_rate == 2e-4


def test_fields_of_trl_are_taken_with_their_types() -> None:
    config = TrainConfig.from_mapping(
        {**NEEDED, "neftune_noise_alpha": "5", "torch_compile": "true", "adam_beta1": 0.8}
    )
    assert config.extra == {"neftune_noise_alpha": 5.0, "torch_compile": True, "adam_beta1": 0.8}


def test_quantization() -> None:
    assert TrainConfig(**NEEDED).quantization() is None  # what the folder is in, or else NF4
    assert TrainConfig(**NEEDED, format="fp4", double_quant=False).quantization() == QuantConfig(
        format="fp4", double_quant=False
    )
    assert TrainConfig(**NEEDED, format="none").quantization() is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, r"has the unknown key `learning_rat`; did you mean `learning_rate`\?"),
        ({"lora_rank": 1}, r"unknown key `lora_rank`; did you mean `lora_r"),
        ({"gradient_acumulation_steps": 1}, r"did you mean `gradient_accumulation_steps`\?"),
        ({"Packing": True}, r"did you mean `packing`\?"),
        ({"xyzzy_plugh": 1}, r"unknown key `xyzzy_plugh`; `fourbit train --help` lists"),
        ({"output_dir": "x"}, "here it is `output` that says this"),
        ({"bf16": True}, "here it is `dtype` that says this"),
        ({"loss_type": "dft"}, "which is not possible here: the loss is the cross-entropy"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "has both `warmup_ratio` and `warmup_steps`"),
        ({"learning_rate": -1e-4}, r"`learning_rate` is -0\.0001; it must be above 0"),
        ({"learning_rate": 0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan; it must be a number"),
        ({"learning_rate": "fast"}, "`learning_rate` is 'fast'; it must be a number"),
        ({"max_steps": 0}, "`max_steps` is 0; it must be 1 or more, or -1"),
        ({"max_steps": 2.5}, r"`max_steps` is 2\.5; it must be a whole number"),
        ({"lora_r": 0}, "`lora_r` is 0; it must be 1 or more"),
        ({"lora_r": True}, "`lora_r` is True; it must be a whole number"),
        ({"lora_dropout": 1}, "must be from 0 to below 1"),
        ({"packing": "maybe"}, "`packing` is 'maybe'; it must be true or false"),
        ({"loss_on": "anwsers"}, "`loss_on` is 'anwsers'; it must be one of answers, all"),
        ({"dtype": "int8"}, "`dtype` is 'int8'; it must be one of float32, bfloat16, float16"),
        ({"format": "nf5"}, "nf5"),
        ({"format": "none", "block_size": 64}, "none quantizes nothing"),
        ({"seed": 2**32}, "`seed` is 4294967296; it must be 4294967295 at most"),
        ({"data_seed": 2**64}, "`data_seed` is 18446744073709551616; it must be 4294967295 at most"),
        ({"eval_data": "held.jsonl", "eval_size": 3}, "`eval_size` takes a part of `data`"),
        ({"fsdp": "full_shard"}, "`fsdp`, which is not possible here: a run takes one process"),
        ({"push_to_hub": True}, "`push_to_hub`, which is not possible here"),
        ({"block_size": 60}, "60"),
        ({"max_length": 1}, "`max_length` is 1; it must be 2 or more"),
        ({"target_modules": [1]}, "`target_modules` is .* it must be a text or a list"),
        ({"neftune_noise_alpha": "much"}, "`neftune_noise_alpha` is 'much'; it must be a number"),
        ({"model": None}, "says nothing of `model`; give a model folder"),
        ({"data": ""}, "`data` is empty"),
    ],
)
def test_what_makes_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig.from_mapping({**NEEDED, **given})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\ndata: d\n", "broken YAML in line 2"),
        ("just words", "holds no keys and values"),
        ("- a\n- b\n", "holds no keys and values"),
        ("", "holds no keys and values"),
        ("model: !!python/object/apply:os.system ['x']", "broken YAML in line 1"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        TrainConfig.load(path)


def test_no_yaml_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no file"):
        TrainConfig.load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no text file"):
        TrainConfig.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("pair", "message"), [("fast", "is no key=value"), ("=1", "is no key=value"), ("a=[", "broken")]
)
def test_pairs_that_are_none(pair: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_pairs([pair])


def test_a_key_given_twice() -> None:
    with pytest.raises(InputError, match="`a` is given twice"):
        parse_pairs(["a=1", "a=2"])


def test_a_bare_no_is_a_word_where_a_word_is_asked_for() -> None:
    """YAML reads `save_strategy: no`, as recipes have it, as false."""
    config = TrainConfig.from_mapping({"model": "m", "data": "d", "output": "o", "save_strategy": False})
    assert config.extra["save_strategy"] == "no"
