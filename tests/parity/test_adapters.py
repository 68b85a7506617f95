"""Adapters go to and fro between ours, stock peft on the dense model, and stock peft on bitsandbytes.

Every way to create or load an adapter must take the fused layer, and every file must mean the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fourbit
from fourbit.nn import QuantLinear
from fourbit.nn.lora import LoraQuantLinear

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

LINEAR_LAYERS = 2 * 7
# Three runs of the same fp32 products in other orders: sums of up to 320 terms, rounded 2^-24 each, through 2 layers of
# residual stream; logits and what enters them are of the order of 1 to 4.
TOLERANCE = 4 * 320 * 2**-24 * 4


def settings(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def ids() -> Tensor:
    return torch.randint(0, 192, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    """With gradients enabled and in train(): the only way in which bitsandbytes' CPU layers keep their weights."""
    return model.train()(input_ids=ids()).logits.detach()  # type: ignore[no-any-return]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE)


def ours(folder: Path) -> Any:
    return fourbit.load(folder, dtype=torch.float32)


def decoded(folder: Path) -> Any:
    """The dense model with what our 4-bit weights decode to: what stock peft computes on it is the truth."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in ours(folder).named_modules():
        if isinstance(layer, QuantLinear):
            model.get_submodule(name).weight.data = layer.dequantize()
    return model


def bitsandbytes(folder: Path) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def trained(model: Any, **changes: Any) -> PeftModel:
    """An adapter whose B is not zero, as after training."""
    model = get_peft_model(model, settings(**changes))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def saved(tiny_llama: Path, tmp_path: Path) -> Path:
    """An adapter, saved by stock peft from the dense model."""
    folder = tmp_path / "adapter"
    trained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)).save_pretrained(folder)
    return folder


@pytest.fixture
def truth(tiny_llama: Path, saved: Path) -> Tensor:
    """The logits of that adapter on the decoded weights, by stock peft."""
    return logits(PeftModel.from_pretrained(decoded(tiny_llama), saved))


def fused_layers(model: nn.Module) -> int:
    assert all(isinstance(layer, LoraQuantLinear) for layer in model.modules() if isinstance(layer, LoraLayer))
    return sum(isinstance(layer, LoraQuantLinear) for layer in model.modules())


# Every entry


def by_get_peft_model(folder: Path, adapter: Path) -> Any:
    model = get_peft_model(ours(folder), settings())
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    return model


def by_from_pretrained(folder: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(ours(folder), adapter)


def by_from_pretrained_with_little_memory(folder: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(ours(folder), adapter, low_cpu_mem_usage=True)


def by_load_adapter(folder: Path, adapter: Path) -> Any:
    model = get_peft_model(ours(folder), settings(target_modules=["q_proj"]))
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    return model


def by_add_adapter(folder: Path, adapter: Path) -> Any:
    model = get_peft_model(ours(folder), settings(target_modules=["q_proj"]))
    model.add_adapter("second", settings())
    set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"), adapter_name="second")
    model.set_adapter("second")
    return model


def by_injection(folder: Path, adapter: Path) -> Any:
    model = inject_adapter_in_model(settings(), ours(folder))
    tensors = load_file(adapter / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {k.removeprefix("base_model.model."): v for k, v in tensors.items()})
    return model


def by_transformers_add_adapter(folder: Path, adapter: Path) -> Any:
    model = ours(folder)
    model.add_adapter(settings(), "mine")
    tensors = load_file(adapter / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {k.removeprefix("base_model.model."): v for k, v in tensors.items()}, "mine")
    return model


def by_transformers_load_adapter(folder: Path, adapter: Path) -> Any:
    model = ours(folder)
    model.load_adapter(str(adapter))
    return model


def by_auto_peft_model(folder: Path, adapter: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(
        adapter, quantization_config=fourbit.QuantConfig(), dtype=torch.float32
    )


def by_fourbit_load(folder: Path, adapter: Path) -> Any:
    return fourbit.load(folder, adapter=adapter, dtype=torch.float32)


def by_a_mixed_model(folder: Path, adapter: Path) -> Any:
    model = get_peft_model(ours(folder), settings(), mixed=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    set_peft_model_state_dict(model, tensors)
    return model


ENTRIES: list[Callable[[Path, Path], Any]] = [
    by_get_peft_model,
    by_from_pretrained,
    by_from_pretrained_with_little_memory,
    by_load_adapter,
    by_add_adapter,
    by_injection,
    by_transformers_add_adapter,
    by_transformers_load_adapter,
    by_auto_peft_model,
    by_fourbit_load,
    by_a_mixed_model,
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_every_entry_takes_the_fused_layer(
    entry: Callable[[Path, Path], Any], tiny_llama: Path, saved: Path, truth: Tensor
) -> None:
    model = entry(tiny_llama, saved)
    assert fused_layers(model) == LINEAR_LAYERS
    assert close(logits(model), truth)


def test_the_adapter_makes_a_difference(tiny_llama: Path, truth: Tensor) -> None:
    """Or else everything here would pass without it."""
    assert (logits(ours(tiny_llama)) - truth).abs().max() > 1000 * TOLERANCE


# Files


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["plain", "rslora", "dora", "saved module"],
)
def test_what_we_save_is_what_stock_peft_saves(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The same files: names, shapes, dtypes, settings, with no trace of where they were made."""
    models = {"ours": ours(tiny_llama), "stock": AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)}
    for name, model in models.items():
        trained(model, **changes).save_pretrained(tmp_path / name)
    written = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in models}
    assert {k: (v.shape, v.dtype) for k, v in written["ours"].items()} == {
        k: (v.shape, v.dtype) for k, v in written["stock"].items()
    }
    configs = {name: json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in models}
    for config in configs.values():
        config["target_modules"] = sorted(config["target_modules"])  # a set
        config.pop("base_model_name_or_path")
    assert configs["ours"] == configs["stock"]
    assert "fourbit" not in json.dumps(configs["ours"])


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_an_adapter_of_ours_loads_in_stock_peft(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = trained(ours(tiny_llama), **changes)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    on_dense = PeftModel.from_pretrained(decoded(tiny_llama), tmp_path)
    assert close(logits(on_dense), expected)
    assert close(logits(PeftModel.from_pretrained(bitsandbytes(tiny_llama), tmp_path)), expected)
    loaded = get_peft_model_state_dict(on_dense)
    assert all(torch.equal(value, loaded[key]) for key, value in get_peft_model_state_dict(model).items())


def test_on_the_16_bit_model_only_the_base_differs(tiny_llama: Path, saved: Path) -> None:
    """What the adapter adds to one layer is the same, to the bit of the product, whatever the base is in."""
    dense = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), saved)
    quantized = PeftModel.from_pretrained(ours(tiny_llama), saved)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    x = torch.randn(5, 320, generator=torch.Generator().manual_seed(0))
    added = []
    for model in (dense, quantized):
        layer = model.get_submodule(name)
        with_adapter = layer(x)
        layer.enable_adapters(False)  # type: ignore[operator]
        added.append(with_adapter - layer(x))
    assert close(*added)
    assert added[0].abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_an_adapter_from_bitsandbytes_loads_here(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    model = trained(bitsandbytes(tiny_llama), **changes)
    model.save_pretrained(tmp_path)
    assert close(logits(PeftModel.from_pretrained(ours(tiny_llama), tmp_path)), logits(model))


def test_a_merged_model_is_near_the_adapted_one(tiny_llama: Path, saved: Path, truth: Tensor) -> None:
    model = PeftModel.from_pretrained(ours(tiny_llama), saved)
    with pytest.warns(UserWarning, match="rounds them again"):
        merged = model.merge_and_unload()
    assert sum(type(layer) is QuantLinear for layer in merged.modules()) == LINEAR_LAYERS
    # merging rounds to 4 bits once more, as quantizing did: the two errors are of one size
    plain = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), saved))
    assert (logits(merged) - truth).norm() < 1.5 * (truth - plain).norm()


def test_a_merged_model_can_be_saved_and_read_by_bitsandbytes(tiny_llama: Path, saved: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(ours(tiny_llama), saved)
    with pytest.warns(UserWarning, match="rounds them again"):
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {type(layer).__name__ for layer in stock.modules()} >= {"Linear4bit"}
    assert close(logits(stock), logits(merged))
