"""`fourbit.load`: the same model as the standard call gives, from every kind of folder, in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.errors import AdapterMismatch, InputError, UnsupportedDtype
from fourbit.nn import QuantLinear

Make = Callable[[str], Any]

# peft 0.21 asks transformers 5.23 for a property by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_it_gives_what_the_standard_call_gives(architecture: Any) -> None:
    config = fourbit.QuantConfig()
    standard = architecture.model_class.from_pretrained(
        architecture.folder, quantization_config=config, dtype=torch.bfloat16
    )
    ours = fourbit.load(architecture.folder, config)
    assert type(ours) is type(standard)
    assert not ours.training
    assert torch.equal(architecture.output(ours), architecture.output(standard))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_cast_before_they_are_quantized(tiny: Make, dtype: torch.dtype) -> None:
    standard = tiny("llama").model_class.from_pretrained(
        tiny("llama").folder, quantization_config=fourbit.QuantConfig(), dtype=dtype
    )
    ours = fourbit.load(tiny("llama").folder, dtype=dtype)
    assert ours.dtype == dtype
    assert ours.model.layers[0].mlp.up_proj.weight_dtype == dtype
    assert torch.equal(tiny("llama").output(ours), tiny("llama").output(standard))


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "nf3", "nf2"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_every_format_survives_the_disk(tiny: Make, tmp_path: Path, format: str, double_quant: bool) -> None:
    config = fourbit.QuantConfig(format, 128, double_quant)
    model = fourbit.load(tiny("llama").folder, config)
    model.save_pretrained(tmp_path)
    again = fourbit.load(tmp_path)
    layer = again.model.layers[0].mlp.up_proj
    assert (layer.config.format, layer.config.block_size, layer.config.double_quant) == (format, 128, double_quant)
    assert torch.equal(tiny("llama").output(again), tiny("llama").output(model))


def test_names_without_the_prefix_of_the_base_model(tiny: Make, tmp_path: Path) -> None:
    """The folder of GPT-2 on the hub was saved from the base model; so are many others."""
    shutil.copytree(tiny("gpt2").folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = tiny("gpt2").output(fourbit.load(tiny("gpt2").folder))
    assert torch.equal(tiny("gpt2").output(fourbit.load(tmp_path)), expected)


def test_shards(tiny: Make, tmp_path: Path) -> None:
    model = tiny("llama").model_class.from_pretrained(tiny("llama").folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = tiny("llama").output(fourbit.load(tiny("llama").folder))
    assert torch.equal(tiny("llama").output(fourbit.load(tmp_path)), expected)


def test_a_folder_in_four_bits_keeps_what_it_has(tiny: Make, tmp_path: Path) -> None:
    config = fourbit.QuantConfig("fp4", 128, double_quant=False)
    fourbit.load(tiny("llama").folder, config).save_pretrained(tmp_path)
    for asked in (None, config):
        layer = fourbit.load(tmp_path, asked).model.layers[0].mlp.up_proj
        assert (layer.config.format, layer.config.block_size, layer.config.double_quant) == ("fp4", 128, False)
        assert layer.config.compute_dtype is None
    wide = fourbit.QuantConfig("fp4", 128, double_quant=False, compute_dtype="float32")
    assert fourbit.load(tmp_path, wide).model.layers[0].mlp.up_proj.config.compute_dtype == "float32"
    for other in (
        fourbit.QuantConfig("nf4", 128, double_quant=False),
        fourbit.QuantConfig("fp4", 64, double_quant=False),
        fourbit.QuantConfig("fp4", 128, double_quant=True),
    ):
        with pytest.raises(InputError, match="in 4 bits already, as fp4 in blocks of 128 with fp32 scales"):
            fourbit.load(tmp_path, other)
    with pytest.raises(InputError, match="skip"):
        fourbit.load(tmp_path, fourbit.QuantConfig("fp4", 128, double_quant=False, skip=("mlp",)))


def test_what_stays_in_16_bits_takes_the_dtype_asked_for(tiny: Make, tmp_path: Path) -> None:
    fourbit.load(tiny("qwen2").folder).save_pretrained(tmp_path)
    model = fourbit.load(tmp_path, dtype=torch.float32)
    floating = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    assert set(floating.values()) == {torch.float32}
    assert any(name.endswith("bias") for name in floating)
    assert model.model.layers[0].mlp.up_proj.absmax.dtype == torch.uint8


def test_codes_that_are_stored_under_another_dtype(tiny: Make, tmp_path: Path) -> None:
    """bitsandbytes' `quant_storage`: the same bytes, called bfloat16."""
    model = fourbit.load(tiny("llama").folder)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = [key.partition(".quant_state")[0] for key in tensors if ".quant_state" in key]
    tensors |= {key: tensors[key].view(-1).view(torch.bfloat16).view(-1, 1) for key in packed}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(tiny("llama").output(fourbit.load(tmp_path)), tiny("llama").output(model))


def test_the_model_knows_where_it_came_from(tiny: Make, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama").folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    model = fourbit.load(tmp_path)
    assert model.name_or_path == str(tmp_path)  # peft writes it into adapters
    assert model.generation_config.temperature == 0.25


def test_only_floating_dtypes_compute(tiny: Make) -> None:
    with pytest.raises(UnsupportedDtype, match="int8"):
        fourbit.load(tiny("llama").folder, dtype=torch.int8)


def adapter(folder: Path, tiny: Any, **settings: Any) -> Path:
    """Train nothing, but give the adapter values that matter."""
    model = peft.get_peft_model(
        fourbit.load(tiny.folder), peft.LoraConfig(r=4, target_modules="all-linear", **settings)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_an_adapter(tiny: Make, tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path, tiny(name))
    model = fourbit.load(tiny(name).folder, adapter=folder)
    assert isinstance(model, peft.PeftModel)
    expected = peft.PeftModel.from_pretrained(fourbit.load(tiny(name).folder), folder)
    output = tiny(name).output(model)
    assert torch.equal(output, tiny(name).output(expected))
    assert not torch.equal(output, tiny(name).output(fourbit.load(tiny(name).folder)))


def test_an_adapter_with_a_module_that_was_trained_whole(tiny: Make, tmp_path: Path) -> None:
    folder = adapter(tmp_path, tiny("llama"), modules_to_save=["lm_head"])
    assert isinstance(fourbit.load(tiny("llama").folder, adapter=folder), peft.PeftModel)


def test_an_adapter_of_another_architecture_is_refused(tiny: Make, tmp_path: Path) -> None:
    folder = adapter(tmp_path, tiny("phi3"))
    with pytest.raises(AdapterMismatch, match=r"LlamaForCausalLM has no model\.layers\.0\.mlp\.gate_up_proj"):
        fourbit.load(tiny("llama").folder, adapter=folder)


def test_an_adapter_of_another_size_is_refused(tiny: Make, tmp_path: Path) -> None:
    folder = adapter(tmp_path, tiny("llama"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file(tensors | {name: torch.zeros(4, 48)}, weights)
    with pytest.raises(AdapterMismatch, match=r"up_proj\.lora_A\.weight has the shape \[4, 48\].* must be 64"):
        fourbit.load(tiny("llama").folder, adapter=folder)


def test_an_adapter_that_lacks_a_part_is_refused(tiny: Make, tmp_path: Path) -> None:
    folder = adapter(tmp_path, tiny("llama"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    save_file(tensors, weights)
    with pytest.raises(AdapterMismatch, match=r"up_proj"):
        fourbit.load(tiny("llama").folder, adapter=folder)


def test_loading_twice_gives_the_same_and_leaves_the_folder_alone(tiny: Make) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tiny("llama").folder.iterdir()}
    first, second = fourbit.load(tiny("llama").folder), fourbit.load(tiny("llama").folder)
    assert torch.equal(tiny("llama").output(first), tiny("llama").output(second))
    assert {path.name: path.stat().st_mtime_ns for path in tiny("llama").folder.iterdir()} == before


def test_a_model_can_be_saved_over_its_own_folder(tiny: Make, tmp_path: Path) -> None:
    """Its tensors must not be views of the file that is written."""
    fourbit.load(tiny("llama").folder).save_pretrained(tmp_path)
    model = fourbit.load(tmp_path)
    expected = tiny("llama").output(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny("llama").output(model), expected)
    assert torch.equal(tiny("llama").output(fourbit.load(tmp_path)), expected)


MEASURE = """
import sys, torch, transformers, fourbit
from fourbit.nn import QuantLinear

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))

warmup, folder = sys.argv[1:]
fourbit.load(warmup)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak
before = memory("VmRSS"), memory("RssAnon")
model = fourbit.load(folder)
held = sum(p.nbytes for p in model.parameters()) + sum(
    layer.absmax.nbytes + layer.nested_absmax.nbytes for layer in model.modules() if isinstance(layer, QuantLinear)
)
print(memory("VmHWM") - before[0], memory("RssAnon") - before[1], held)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a part needs Linux' /proc")
def test_loading_holds_one_tensor_beyond_the_model(tmp_path: Path, tiny: Make) -> None:
    """Resident memory, mapped pages included; 2 MiB are left for the interpreter's own growth and 4 for the allocator.

    The tensors are of two sizes, T and T/2, and the reader keeps one block of each: 1.5 T beyond the 4-bit model. The
    whole model in 16 bits has 36 T, so holding it, or mapping its file, fails by far.
    """
    size = 1 << 23
    model_class = tiny("llama").model_class
    config = model_class.config_class(
        vocab_size=64, hidden_size=2048, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=8, architectures=["LlamaForCausalLM"], tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        outline = model_class(config)
    tensors = {name: torch.ones(p.shape, dtype=torch.bfloat16) for name, p in outline.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor.normal_(generator=generator)
    assert max(tensor.nbytes for tensor in tensors.values()) == size
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tiny("llama").folder), str(tmp_path)],
        capture_output=True, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"},
    )  # fmt: skip
    peak, anonymous, held = map(int, run.stdout.split())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 36 * size
    assert held < 9.5 * size
    assert peak - held < 1.5 * size + (6 << 20)
    assert anonymous - held < size // 2 + (6 << 20)


def test_every_layer_is_on_one_device(tiny: Make) -> None:
    model = fourbit.load(tiny("llama").folder, device="cpu")
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert {layer.weight.device.type for layer in layers} == {"cpu"}
