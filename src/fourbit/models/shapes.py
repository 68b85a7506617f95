"""Shapes of well-known models by name, and models of that shape with random weights that are born in 4 bits.

What a kernel, a training step or a decode loop costs depends on shapes, not on what a model has learnt. So a 65 B
model can be measured without a download and without its 130 GB in 16 bits ever existing: each packed weight is drawn
where it is to live, and no step on the way is larger than the model itself.

Random codes are a plausible weight because NormalFloat uses each of its codes about equally often. The scales are drawn
around the value at which a decoded weight has the standard deviation 1 / sqrt(K), which keeps activations near 1
through any number of layers.

Importing this imports no torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fourbit.errors import InputError
from fourbit.formats import Codebook, block_count, packed_size, quantized_size_bytes
from fourbit.models.process import available_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from fourbit.quant import QuantConfig, QuantizedTensor

__all__ = ["SHAPES", "Shape", "config_of", "free_bytes", "random_model", "shape_of", "size_bytes"]

PAIRING = np.random.default_rng(0).permutation(256)
"""Which code goes with which into a byte, so that neighbours do not depend on each other."""

PIECE = 1 << 24
"""Bytes of a weight that are drawn at once."""

SPREAD = 0.25
"""Scales lie within this part around their middle, so that double quantization has something to do."""


@dataclass(frozen=True)
class Shape:
    """What a model's published config.json says of its size.

    Attributes:
        name: how a user asks for it.
        model_type: of transformers.
        parameters: in all, embeddings included, as published.
        settings: of the config class.
    """

    name: str
    model_type: str
    parameters: int
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def head_parameters(self) -> int:
        """Those of the output head, tied or not."""
        count: int = self.settings["hidden_size"] * self.settings["vocab_size"]
        return count

    @property
    def layer_parameters(self) -> int:
        """Those of all layers, norms included: what a token is multiplied with on its way to the head."""
        return self.parameters - self.head_parameters * (1 if self.settings["tie_word_embeddings"] else 2)


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, *, key_value_heads: int | None = None, **others: Any
) -> dict[str, Any]:
    """The settings of a LLaMA; those of the first generation unless told otherwise."""
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads or heads,
        "vocab_size": 32_000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **others,
    }


def _llama3(factor: float) -> dict[str, Any]:
    """What LLaMA 3.1 and 3.2 have in common; `factor` stretches their rotary embeddings."""
    return {
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_TIED = {"tie_word_embeddings": True}

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("tiny", "llama", 98_624, _llama(64, 128, 2, 4, vocab_size=256, **_TIED)),
        Shape("llama-135m", "llama", 135_545_856, _llama(1024, 2816, 8, 16, **_TIED)),
        Shape(
            "tinyllama-1.1b", "llama", 1_100_048_384, _llama(2048, 5632, 22, 32, key_value_heads=4, rms_norm_eps=1e-5)
        ),
        Shape("llama-7b", "llama", 6_738_415_616, _llama(4096, 11008, 32, 32)),
        Shape("llama-13b", "llama", 13_015_864_320, _llama(5120, 13824, 40, 40)),
        Shape("llama-33b", "llama", 32_528_943_616, _llama(6656, 17920, 60, 52)),
        Shape("llama-65b", "llama", 65_285_660_672, _llama(8192, 22016, 80, 64, rms_norm_eps=1e-5)),
        Shape(
            "llama-3.2-1b", "llama", 1_235_814_400,
            _llama(2048, 8192, 16, 32, key_value_heads=8, **_llama3(32.0), **_TIED),
        ),
        Shape(
            "llama-3.2-3b", "llama", 3_212_749_824,
            _llama(3072, 8192, 28, 24, key_value_heads=8, **_llama3(32.0), **_TIED),
        ),
        Shape("llama-3.1-8b", "llama", 8_030_261_248, _llama(4096, 14336, 32, 32, key_value_heads=8, **_llama3(8.0))),
        Shape("llama-3.1-70b", "llama", 70_553_706_496, _llama(8192, 28672, 80, 64, key_value_heads=8, **_llama3(8.0))),
        Shape(
            "mistral-7b",
            "mistral",
            7_241_732_096,
            _llama(
                4096, 14336, 32, 32, key_value_heads=8,
                max_position_embeddings=32_768, rms_norm_eps=1e-5, sliding_window=None,
            ),
        ),
        Shape(
            "qwen3-4b",
            "qwen3",
            4_022_468_096,
            _llama(
                2560, 9728, 36, 32, key_value_heads=8, head_dim=128, vocab_size=151_936, max_position_embeddings=40_960,
                rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, **_TIED,
            ),
        ),
    )
}  # fmt: skip
"""By name. LLaMA's from arXiv:2302.13971, table 2, and the released config.json files; the others from theirs."""


def shape_of(name: str) -> Shape:
    """Look a shape up by name.

    Raises:
        InputError: with the nearest valid name.
    """
    if name in SHAPES:
        return SHAPES[name]
    nearest = difflib.get_close_matches(str(name).lower(), SHAPES, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise InputError(f"There is no model shape named {name!r}; the shapes are {', '.join(SHAPES)}.{hint}")


def config_of(name: str, *, layers: int | None = None) -> PreTrainedConfig:
    """A shape as transformers describes it.

    Args:
        layers: keep only so many, to measure what does not depend on depth.

    Raises:
        InputError: an unknown name, or a number of layers that the shape does not have.
    """
    from transformers import AutoConfig

    shape = shape_of(name)
    settings = dict(shape.settings)
    if layers is not None:
        if not 1 <= layers <= settings["num_hidden_layers"]:
            raise InputError(
                f"{name} has {settings['num_hidden_layers']} layers, and {layers} were asked for; take 1 or more of"
                " them."
            )
        settings["num_hidden_layers"] = layers
    config: PreTrainedConfig = AutoConfig.for_model(shape.model_type, **settings)
    return config


def random_model(
    shape: str | PreTrainedConfig,
    config: QuantConfig | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A model of transformers with random weights, in 4 bits from the start.

    Args:
        shape: a name in `SHAPES`, or a config of transformers.
        config: how it is quantized: which layers, format, block size, double quantization. None leaves it in 16 bits.
        device: where it is made; nothing of it is anywhere else before.
        dtype: of everything that is not in 4 bits; bf16 by default.
        layers: see `config_of`; only together with a name.
        seed: the same seed gives the same model on the same type of device.

    Returns:
        the model, in evaluation mode, as `fourbit.load` would have given it: the same layers, ready for adapters.

    Memory: the model, and the scales of one layer in fp32.

    Raises:
        InputError: an unknown name, a config with nothing to quantize, or less free memory than the model takes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from fourbit.models.quantizer import FourBitQuantizer

    model_config = config_of(shape, layers=layers) if isinstance(shape, str) else shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype or torch.bfloat16)
    model.eval()
    quantizer = None
    if config is not None:
        quantizer = FourBitQuantizer(config)
        quantizer.preprocess_model(model)
        model.hf_quantizer = quantizer
    device = torch.device(device)
    _check_room(shape if isinstance(shape, str) else type(model).__name__, size_bytes(model), device)
    indices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(indices, device_type="cuda" if device.type == "cpu" else device.type), torch.no_grad():
        torch.manual_seed(seed)
        _fill_quantized(model, device)
        _fill_rest(model, device)
    if quantizer is not None:
        quantizer.postprocess_model(model)
    return model


def size_bytes(model: nn.Module) -> int:
    """What a model's parameters take, scales included; for one on the meta device, what they will take."""
    from fourbit.nn import QuantLinear

    total, seen = 0, set[int]()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, QuantLinear) and parameter is module.weight:
                total += quantized_size_bytes(
                    module.in_features * module.out_features,
                    block_size=module.config.block_size,
                    double_quant=module.config.double_quant,
                )
            else:
                total += parameter.nbytes
    return total


def free_bytes(device: torch.device) -> int | None:
    """What could still be allocated on a device; None where nobody says."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes() if device.type == "cpu" else None


def _check_room(name: str, needed: int, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and needed > free:
        raise InputError(
            f"The weights of {name} take {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free;"
            " take a smaller shape, or fewer layers."
        )


def _fill_quantized(model: nn.Module, device: torch.device) -> None:
    """Draw the codes and scales of every layer in 4 bits, where they are to stay."""
    import torch

    from fourbit.nn import QuantLinear

    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.weight.device.type == "meta":
            bias = layer.bias
            layer.weight = torch.nn.Parameter(torch.empty(0, dtype=torch.uint8, device=device), requires_grad=False)
            layer.set_quantized(_random_weight(layer, device))
            if bias is not None:
                layer.bias = torch.nn.Parameter(torch.zeros_like(bias, device=device), requires_grad=bias.requires_grad)
            layer._is_hf_initialized = True  # type: ignore[assignment]  # transformers would draw it anew,
            layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # GPT-2's blocks their layers' too


def _random_weight(layer: Any, device: torch.device) -> QuantizedTensor:
    import torch

    from fourbit.kernels import ops
    from fourbit.quant import QuantizedTensor

    config, shape = layer.config, torch.Size((layer.out_features, layer.in_features))
    count = shape.numel()
    packed = torch.empty(packed_size(count), dtype=torch.uint8, device=device).random_(0, 256)
    codes = _balanced_codes(config.codebook)
    pairs = torch.from_numpy((codes << 4) | codes[PAIRING]).to(device)
    for piece in packed.split(PIECE):
        piece.copy_(pairs[piece.int()])
    deviation = float(np.sqrt(np.square(config.codebook.table[codes]).mean()))
    middle = 1 / (math.sqrt(layer.in_features) * deviation)
    absmax = torch.empty(block_count(count, config.block_size), device=device)
    absmax.uniform_(middle * (1 - SPREAD), middle * (1 + SPREAD))
    nested_absmax = nested_offset = None
    if config.double_quant:
        absmax, nested_absmax, nested_offset = ops.quantize_absmax(absmax)
    return QuantizedTensor(
        packed, absmax, nested_absmax, nested_offset, shape, layer.weight_dtype, config.format, config.block_size
    )


def _balanced_codes(codebook: Codebook) -> npt.NDArray[np.uint8]:
    """[256] uint8: codes in such numbers that the mean of their levels is 0, as the mean of a weight is.

    NF4 has one more positive level than negative ones, so codes drawn equally often have a mean; through a network that
    mean grows until it is all there is. The numbers follow exp(-t level), which is the least change that takes it away.
    """
    levels = np.array(codebook.levels, dtype=np.float64)
    low, high = -8.0, 8.0
    for _ in range(60):  # the mean falls as t grows
        middle = (low + high) / 2
        tilted = np.exp(-middle * levels)
        low, high = (middle, high) if tilted @ levels > 0 else (low, middle)
    exact = np.cumsum(tilted / tilted.sum()) * 256
    return np.searchsorted(exact, np.arange(256) + 0.5).clip(max=len(levels) - 1).astype(np.uint8)


def _fill_rest(model: PreTrainedModel, device: torch.device) -> None:
    """Give what is not in 4 bits memory on the device, tied parameters once, and the values the model class draws."""
    import torch

    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                if id(parameter) not in moved:
                    empty = torch.empty_like(parameter, device=device)
                    moved[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module.register_parameter(name, moved[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=persistent)
    model.initialize_weights()
    model.tie_weights()
