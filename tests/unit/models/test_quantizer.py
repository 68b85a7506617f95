"""The standard call: `from_pretrained(..., quantization_config=QuantConfig())`, and `save_pretrained` after it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel, PreTrainedModel

import fourbit
from fourbit.errors import BrokenCheckpoint, InputError, NonFiniteWeight
from fourbit.nn import QuantLinear
from fourbit.nn.linear import linear_weight

Make = Callable[[str], Any]

HEADS = {
    "bert": {"cls.predictions.decoder"},
    "bert_classifier": {"classifier"},
    "dinov2_with_registers": set(),
    "vit": {"classifier"},
}
"""The linear layers that stay in 16 bits where it is not `lm_head`."""

EXPERTS = ("mixtral", "qwen3_moe")


def plain(tiny: Any, config: fourbit.QuantConfig | None = None, **arguments: Any) -> PreTrainedModel:
    model: PreTrainedModel = tiny.model_class.from_pretrained(
        tiny.folder, quantization_config=config or fourbit.QuantConfig(), **arguments
    )
    return model


def quantized(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


def linear(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    kinds = ("Linear", "Conv1D", "FalconLinear")
    return {name: layer for name, layer in model.named_modules() if type(layer).__name__ in kinds}


def test_every_linear_layer_but_the_head_is_in_four_bits(architecture: Any) -> None:
    original = linear(architecture.model_class.from_pretrained(architecture.folder))
    model = plain(architecture)
    left = HEADS.get(architecture.name, {"lm_head"})
    if architecture.name == "t5":  # T5 keeps these in fp32, as they overflow in fp16
        left = left | {name for name in original if name.endswith(".wo")}
    assert quantized(model).keys() == original.keys() - left
    assert linear(model).keys() == left
    for name, layer in quantized(model).items():
        expected = fourbit.quantize(linear_weight(original[name]), fourbit.QuantConfig())
        assert torch.equal(layer.quantized.packed, expected.packed), name
        assert torch.equal(layer.absmax, expected.absmax), name
        assert torch.equal(layer.nested_absmax, expected.nested_absmax), name
        assert not layer.weight.requires_grad


def test_all_else_stays_as_it_was(architecture: Any) -> None:
    original = architecture.model_class.from_pretrained(architecture.folder).state_dict()
    model = plain(architecture)
    ours = {f"{name}.weight" for name in quantized(model)}
    state = model.state_dict()
    for name in original.keys() - ours:
        assert torch.equal(state[name], original[name]), name
        assert state[name].dtype == original[name].dtype, name


@pytest.mark.parametrize("name", ["llama_tied", "gemma", "gpt2", "t5"])
def test_tied_weights_stay_tied(tiny: Make, name: str, tmp_path: Path) -> None:
    model = plain(tiny(name))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = fourbit.load(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_saved_model_loads_and_saves_again(architecture: Any, tmp_path: Path) -> None:
    model = plain(architecture)
    model.save_pretrained(tmp_path / "first", max_shard_size="40KB")
    assert (tmp_path / "first/model.safetensors.index.json").exists()
    again = fourbit.load(tmp_path / "first")
    assert torch.equal(architecture.output(again), architecture.output(model))
    again.save_pretrained(tmp_path / "second")
    model.save_pretrained(tmp_path / "third")
    second, third = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "third"))
    assert second.keys() == third.keys()
    assert all(torch.equal(second[key], third[key]) for key in third)


def test_the_saved_config_is_that_of_bitsandbytes(tiny: Make, tmp_path: Path) -> None:
    plain(tiny("llama"), dtype=torch.float16).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert settings["load_in_4bit"] is True
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"] is True
    assert settings["bnb_4bit_compute_dtype"] == "float16"
    assert settings["llm_int8_skip_modules"] is None  # the rule that transformers applies by itself


def test_heads_that_transformers_would_quantize_are_listed(tiny: Make, tmp_path: Path) -> None:
    plain(tiny("vit")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["classifier"]


def test_a_format_of_ours_is_not_passed_off_as_theirs(tiny: Make, tmp_path: Path) -> None:
    config = fourbit.QuantConfig(format="int4", block_size=32, double_quant=False)
    model = plain(tiny("llama"), config)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "fourbit"
    assert (settings["format"], settings["block_size"], settings["double_quant"]) == ("int4", 32, False)
    keys = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight.quant_state.fourbit__int4" in keys
    again = tiny("llama").model_class.from_pretrained(tmp_path)  # such a folder needs no config
    assert torch.equal(tiny("llama").output(again), tiny("llama").output(model))


def test_skip_leaves_what_it_names(tiny: Make, tmp_path: Path) -> None:
    model = plain(tiny("llama"), fourbit.QuantConfig(skip=("layers.1", "down_proj", "lm_head")))
    assert quantized(model).keys() == {
        f"model.layers.0.{name}"
        for name in ("mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{part}_proj" for part in "qkvo"))
    }
    model.save_pretrained(tmp_path)
    assert quantized(fourbit.load(tmp_path)).keys() == quantized(model).keys()


def test_an_empty_skip_quantizes_the_head_too(tiny: Make, tmp_path: Path) -> None:
    model = plain(tiny("llama"), fourbit.QuantConfig(skip=()))
    assert isinstance(model.lm_head, QuantLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny("llama").output(fourbit.load(tmp_path)), tiny("llama").output(model))


def test_an_empty_skip_leaves_a_tied_head(tiny: Make) -> None:
    assert not isinstance(plain(tiny("llama_tied"), fourbit.QuantConfig(skip=())).lm_head, QuantLinear)


def test_skip_must_name_something(tiny: Make) -> None:
    with pytest.raises(InputError, match=r"No module of LlamaForCausalLM is named 'mpl'"):
        plain(tiny("llama"), fourbit.QuantConfig(skip=("mpl",)))


def test_something_must_be_left_to_quantize(tiny: Make) -> None:
    with pytest.raises(InputError, match="no linear layer to quantize"):
        plain(tiny("llama"), fourbit.QuantConfig(skip=("model", "lm_head")))


@pytest.mark.parametrize("name", EXPERTS)
def test_fused_experts_stay_in_16_bits_and_that_is_said(
    tiny: Make, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fourbit"):
        model = plain(tiny(name))
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    assert "stay in 16 bits" in caplog.text


def test_nan_is_refused_with_the_name_of_the_tensor(tiny: Make, tmp_path: Path) -> None:
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        folder = tmp_path / name
        model = tiny("llama").model_class.from_pretrained(tiny("llama").folder)
        model.get_parameter(name).data[3, 5] = float("nan")
        model.save_pretrained(folder)
        with pytest.raises(NonFiniteWeight, match=name):
            tiny("llama").model_class.from_pretrained(folder, quantization_config=fourbit.QuantConfig())


def test_a_weight_of_the_wrong_shape_is_named(tiny: Make, tmp_path: Path) -> None:
    model = tiny("llama").model_class.from_pretrained(tiny("llama").folder)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BrokenCheckpoint, match=r"model\.layers\.0\.mlp\.up_proj\.weight has the shape \[127, 64\]"):
        tiny("llama").model_class.from_pretrained(tmp_path, quantization_config=fourbit.QuantConfig())


def test_a_new_layer_is_quantized_like_the_others(tiny: Make, tmp_path: Path) -> None:
    """transformers initialises what a folder lacks when another task is put on a model."""
    BertModel.from_pretrained(tiny("bert").folder).save_pretrained(tmp_path)
    model = BertForMaskedLM.from_pretrained(tmp_path, quantization_config=fourbit.QuantConfig())
    layer = model.cls.predictions.transform.dense
    assert isinstance(layer, QuantLinear)
    assert layer.dequantize().abs().max() > 0
    assert torch.isfinite(tiny("bert").output(model)).all()


def test_dequantize_gives_ordinary_layers_with_the_same_values(tiny: Make, tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        model = plain(tiny(name))
        values = {key: layer.dequantize() for key, layer in quantized(model).items()}
        ordinary = model.dequantize()
        assert not quantized(ordinary)
        assert all(torch.equal(linear_weight(ordinary.get_submodule(key)), values[key]) for key in values)
        ordinary.save_pretrained(tmp_path / name)
        again = tiny(name).model_class.from_pretrained(tmp_path / name)
        assert torch.equal(tiny(name).output(again), tiny(name).output(ordinary))


def test_the_config_reads_what_it_writes() -> None:
    for config in (
        fourbit.QuantConfig(),
        fourbit.QuantConfig("fp4", double_quant=False, compute_dtype="float16", skip=("a.b",)),
        fourbit.QuantConfig("nf3", 128, double_quant=False, skip=()),
    ):
        settings = json.loads(json.dumps(config.to_dict()))
        expected = asdict(config)
        if config.compute_dtype is None and config.format == "nf4":
            expected["compute_dtype"] = "float32"  # bitsandbytes has no None
        assert asdict(fourbit.QuantConfig.from_dict(settings)) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "fourbit", "format": "nf9"},
        {"quant_method": "fourbit", "format": ["nf4"]},
        {"quant_method": "fourbit", "block_size": "64"},
        {"quant_method": "fourbit", "skip": [1]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": "yes"},
        {},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        fourbit.QuantConfig.from_dict(settings)


def test_a_config_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, fourbit; fourbit.QuantConfig().to_dict();"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
