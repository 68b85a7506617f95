"""Folders between fourbit and stock transformers + bitsandbytes, in both directions.

Bits are compared exactly. Values cannot be where bitsandbytes is wrong: its CPU kernel decodes with another block's
scale where a weight's last dimension is no multiple of the block size, and refuses some shapes without gradients. So
logits are compared with theirs on models whose dimensions are multiples of 64, with gradients enabled; and, on the real
model, with those of the definition: each weight is level * scale of its own block.

The tolerance of logits: a dense model with the same decoded weights is run in fp64 (the truth) and in fp32. The fp32
run's largest error e is what rounding alone does to this model on these inputs. Another order of summation may double
an error at worst case in each of two products that are compared, so ours and theirs must lie within 4 e of the truth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

import fourbit
from fourbit.formats import codebook, dynamic_map
from fourbit.models.streaming import quantize_folder
from fourbit.nn import QuantLinear

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the peer to compare with, is not installed")

LLAMA = {
    "vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama_wide": ("LlamaForCausalLM", LLAMA | {"intermediate_size": 256}),
    "llama_tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
IDS = torch.arange(3, 3 + 2 * 16).view(2, 16)

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A random model in fp32, by name."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            class_name, settings = MODELS[name]
            model_class = getattr(transformers, class_name)
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            model_class(model_class.config_class(bos_token_id=1, eos_token_id=2, **settings)).save_pretrained(
                made[name]
            )
        return made[name]

    return make


def settings(format: str, double_quant: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=format, bnb_4bit_use_double_quant=double_quant)


def stock(path: Path, config: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """Stock transformers + bitsandbytes, in the dtype of the folder."""
    arguments = {} if config is None else {"quantization_config": config}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **arguments)
    assert any(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in model.modules())
    return model  # type: ignore[no-any-return]


def logits(model: nn.Module) -> Tensor:
    """With gradients enabled; see above."""
    result: Tensor = model(input_ids=IDS).logits
    return result.detach().double()


def by_definition(layer: QuantLinear) -> Tensor:
    """[N, K] fp32: level * scale of the element's own block, written out here once more."""
    q, count = layer.quantized, layer.in_features * layer.out_features
    codes = torch.stack([q.packed >> 4, q.packed & 15], dim=1).view(-1)[:count].long()
    scales = q.absmax
    if q.nested_absmax is not None:
        nested = q.nested_absmax.repeat_interleave(256)[: scales.numel()]
        scales = torch.from_numpy(dynamic_map())[scales.long()] * nested + q.nested_offset
    levels = torch.from_numpy(codebook(q.format).table)
    blocks = torch.arange(count) // q.block_size
    return (levels[codes] * scales[blocks]).view(layer.out_features, layer.in_features)


def dense(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with ordinary linear layers that hold the decoded weights."""
    decoded = {name: by_definition(m) for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name, weight in decoded.items():
        layer = model.get_submodule(name)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = weight
        if layer.bias is not None:
            linear.bias.data = layer.bias.data
        model.set_submodule(name, linear)
    return model.to(dtype)


def truth_and_tolerance(path: Path, config: fourbit.QuantConfig | None = None) -> tuple[Tensor, float]:
    def load() -> PreTrainedModel:
        return fourbit.load(path, config, dtype=torch.float32)

    truth = logits(dense(load(), torch.float64))
    error = (logits(dense(load(), torch.float32)) - truth).abs().max().item()
    assert 0 < error < 1e-3 * truth.abs().max()
    return truth, 4 * error


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_our_folder_is_theirs_byte_for_byte(
    stories_model: Path, tmp_path: Path, format: str, double_quant: bool
) -> None:
    config = fourbit.QuantConfig(format, double_quant=double_quant)
    stock(stories_model, settings(format, double_quant)).save_pretrained(tmp_path / "theirs")
    quantize_folder(stories_model, tmp_path / "streamed", config)
    fourbit.load(stories_model, config, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    for name in ("streamed", "saved"):
        ours = load_file(tmp_path / name / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype, key
            assert ours[key].shape == theirs[key].shape, key
            assert torch.equal(ours[key], theirs[key]), key
        first, second = (json.loads((tmp_path / f / "config.json").read_text()) for f in (name, "theirs"))
        assert first == second


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_our_folder_in_theirs(folder: Folder, tmp_path: Path, name: str, format: str, double_quant: bool) -> None:
    quantize_folder(folder(name), tmp_path / "out", fourbit.QuantConfig(format, double_quant=double_quant))
    truth, tolerance = truth_and_tolerance(tmp_path / "out")
    assert (logits(stock(tmp_path / "out")) - truth).abs().max() <= tolerance
    assert (logits(fourbit.load(tmp_path / "out", dtype=torch.float32)) - truth).abs().max() <= tolerance


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_their_folder_in_ours(folder: Folder, tmp_path: Path, name: str, format: str, double_quant: bool) -> None:
    theirs = stock(folder(name), settings(format, double_quant))
    theirs.save_pretrained(tmp_path / "out")
    truth, tolerance = truth_and_tolerance(tmp_path / "out")
    assert (logits(fourbit.load(tmp_path / "out", dtype=torch.float32)) - truth).abs().max() <= tolerance
    assert (logits(theirs) - truth).abs().max() <= tolerance


def test_a_block_size_of_ours_is_read_there(folder: Folder, tmp_path: Path) -> None:
    """Their config.json has no block size; it stands with each tensor. All dimensions here are multiples of it."""
    quantize_folder(folder("llama_wide"), tmp_path / "out", fourbit.QuantConfig(block_size=128))
    truth, tolerance = truth_and_tolerance(tmp_path / "out")
    theirs = stock(tmp_path / "out")
    assert theirs.model.layers[0].mlp.up_proj.weight.quant_state.blocksize == 128
    assert (logits(theirs) - truth).abs().max() <= tolerance


def test_the_real_model_goes_there(stories_model: Path, tmp_path: Path) -> None:
    quantize_folder(stories_model, tmp_path / "ours")
    theirs = stock(tmp_path / "ours")
    ours = fourbit.load(tmp_path / "ours", dtype=torch.float32)
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            their = theirs.get_submodule(name)
            assert torch.equal(their.weight.data.view(-1), layer.weight.view(-1)), name
            state = their.weight.quant_state
            assert torch.equal(state.absmax, layer.absmax), name
            assert torch.equal(state.state2.absmax, layer.nested_absmax), name
            assert math.isclose(state.offset.item(), layer.nested_offset.item(), rel_tol=0), name


def test_the_real_model_computes_what_the_definition_says(stories_model: Path, tmp_path: Path) -> None:
    stock(stories_model, settings("nf4", True)).save_pretrained(tmp_path / "theirs")
    truth, tolerance = truth_and_tolerance(tmp_path / "theirs")
    assert (logits(fourbit.load(tmp_path / "theirs", dtype=torch.float32)) - truth).abs().max() <= tolerance


def test_heads_that_we_leave_are_left_there_too(tmp_path: Path) -> None:
    """By their own rule transformers would put this classifier into 4 bits, and find none in the file."""
    vision = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_attention_heads=4, **vision))
    model.save_pretrained(tmp_path / "source")
    quantize_folder(tmp_path / "source", tmp_path / "out")
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert type(theirs.classifier) is nn.Linear
    assert torch.equal(theirs.classifier.weight, model.classifier.weight)
    assert isinstance(
        theirs.vit.layers[0].mlp.fc1
        if hasattr(theirs.vit, "layers")
        else next(m for m in theirs.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)),
        bitsandbytes.nn.Linear4bit,
    )


def test_they_refuse_a_format_that_only_we_know(folder: Folder, tmp_path: Path) -> None:
    quantize_folder(folder("llama"), tmp_path / "out", fourbit.QuantConfig("int4"))
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert "load_in_4bit" not in written
    assert written["quant_method"] not in ("bitsandbytes", "bitsandbytes_4bit")
