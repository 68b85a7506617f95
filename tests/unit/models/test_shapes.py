"""Shapes by name, and models of them that are born in 4 bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fourbit
from fourbit.errors import InputError
from fourbit.formats import CODEBOOKS
from fourbit.models import shapes
from fourbit.nn import QuantLinear


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.config_of(name))
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert sum(unique.values()) == shapes.SHAPES[name].parameters


def test_a_shape_can_be_made_shallower() -> None:
    assert shapes.config_of("qwen3-4b", layers=3).num_hidden_layers == 3
    assert len(shapes.random_model("tiny", None, layers=1).model.layers) == 1
    for wrong in (0, 3):
        with pytest.raises(InputError, match=f"tiny has 2 layers, and {wrong} were asked for"):
            shapes.config_of("tiny", layers=wrong)


def test_an_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no model shape named 'LLaMA7B'; .* Did you mean llama-7b\?"):
        shapes.shape_of("LLaMA7B")


def test_a_model_whose_blocks_draw_their_own_layers() -> None:
    """GPT-2 draws the weight of each block's last product a second time."""
    from transformers import GPT2Config

    model = shapes.random_model(GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100), fourbit.QuantConfig())
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 2 * 4
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("settings", [{}, {"format": "fp4", "double_quant": False}, {"format": "nf3"}, None])
def test_a_random_model_is_one_that_could_have_been_loaded(settings: dict[str, Any] | None) -> None:
    config = None if settings is None else fourbit.QuantConfig(**settings)
    model = shapes.random_model("tiny", config)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == (0 if config is None else 2 * 7)
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])
    assert all(bool((p == 1).all()) for name, p in model.named_parameters() if "norm" in name)
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state.float()
    # Without outliers or a mean that has run away, what a norm of ones gives has the deviation 1, but for the mean of
    # 64 numbers: 1 / sqrt(64) of it.
    assert 0.9 < hidden.std() < 1.1
    if config is None:
        assert not hasattr(model.config, "quantization_config")
    else:
        assert model.hf_quantizer.target_names
        assert {layer.config.format for layer in layers} == {config.format}


def test_weights_are_plausible_in_every_format() -> None:
    for name in CODEBOOKS:
        model = shapes.random_model("llama-135m", fourbit.QuantConfig(format=name), layers=1)
        weight = model.model.layers[0].mlp.down_proj.dequantize().float() * 2816**0.5
        # n = 2.9 M elements: the mean of what is drawn lies within 5 / sqrt(n) = 0.003 of that of the 256 codes, which
        # itself misses 0 by less than half a step of 1/256 of the widest gap between levels. The uniform scales,
        # within a quarter of their middle, add 0.25^2 / 6 = 0.0104 to the deviation.
        assert abs(float(weight.mean())) < 0.01
        assert float(weight.std()) == pytest.approx(1.0104, abs=0.003)


def test_a_seed_is_a_model() -> None:
    def codes(seed: int) -> Any:
        model = shapes.random_model("tiny", fourbit.QuantConfig(), seed=seed)
        return torch.cat([parameter.flatten().double() for parameter in model.parameters()])

    before = torch.get_rng_state()
    assert torch.equal(codes(3), codes(3))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(codes(3), codes(4))


def test_any_config_of_transformers_will_do() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    config.attention_bias = True
    model = shapes.random_model(config, fourbit.QuantConfig(), dtype=torch.float32)
    assert model.dtype == torch.float32
    assert bool((model.model.layers[0].self_attn.q_proj.bias == 0).all())
    assert model(torch.arange(6)[None]).logits.isfinite().all()


def test_what_a_model_will_take_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shapes.random_model("tiny", fourbit.QuantConfig())
    parts = [layer.quantized.nbytes for layer in model.modules() if isinstance(layer, QuantLinear)]
    rest = {id(p): p.nbytes for p in model.parameters() if p.dtype != torch.uint8}
    assert shapes.size_bytes(model) == sum(parts) + sum(rest.values())
    monkeypatch.setattr(shapes, "free_bytes", lambda device: 30 * 10**9)
    monkeypatch.setattr(shapes, "_fill_quantized", lambda *_: pytest.fail("began to allocate"))
    # 64.8 B parameters in layers, at 4.127 bits, and two matrices of 32,000 x 8192 in bf16
    with pytest.raises(InputError, match=r"llama-65b take 34\.5 GB, and cpu has 30\.0 GB free") as caught:
        shapes.random_model("llama-65b", fourbit.QuantConfig())
    assert str(caught.value).endswith("take a smaller shape, or fewer layers.")


def test_no_16_bit_copy_ever_exists() -> None:
    """Two layers of 7B: 209 MB in 4 bits, 810 MB in 16, beside 524 MB of embeddings."""
    program = """
import torch, fourbit
from fourbit.models import shapes
from fourbit.models.process import peak_resident_bytes
shapes.random_model("tiny", fourbit.QuantConfig())
before = peak_resident_bytes()
model = shapes.random_model("llama-7b", fourbit.QuantConfig(), layers=2)
print(peak_resident_bytes() - before - shapes.size_bytes(model))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # One piece of a weight is drawn through 4-byte indices: 16 Mi x (4 + 1) bytes; as much again for the allocator.
    assert int(done.stdout) < 170 << 20


def test_importing_shapes_imports_no_torch() -> None:
    program = "import sys; from fourbit.models import shapes; shapes.shape_of('tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
