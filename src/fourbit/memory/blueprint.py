"""A model as training finds it, of any architecture, without a byte of its weights.

transformers builds it from its configuration on the meta device, our quantizer puts its linear layers into 4 bits, peft
adds the adapter and `fourbit.prepare` its kernels and checkpoints: the same code in the same order as a run. Then every
tensor becomes a fake one, which has shape, dtype and the device "cpu", and no memory, so that `rehearsal` can run it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from fourbit.errors import InputError, NotAModel
from fourbit.formats import NESTED_BLOCK_SIZE, block_count, packed_size
from fourbit.memory.knobs import Knobs
from fourbit.models.architecture import find_class, read_config
from fourbit.models.folders import CONFIG_FILE, locate
from fourbit.models.prepare import assume_loss, fuse_modules, prepare
from fourbit.models.quantizer import FourBitQuantizer
from fourbit.models.shapes import SHAPES, config_of
from fourbit.nn import QuantLinear
from fourbit.quant import QuantConfig
from fourbit.quant.config import NOT_QUANTIZED, chosen_config

__all__ = ["Blueprint", "Weights", "draw", "read_model_config"]


@dataclass(frozen=True)
class Weights:
    """Bytes that are there from the beginning to the end of a run.

    Attributes:
        codes: of the weights in 4 bits.
        scales: of their blocks, and the tables of levels.
        others: embeddings, heads, norms and buffers.
        adapters: the trainable parameters.
        largest: the most that one weight takes when it is decoded for a product.
        parameters, trainable: how many there are, those in 4 bits counted one by one.
    """

    codes: int
    scales: int
    others: int
    adapters: int
    largest: int
    parameters: int
    trainable: int


@dataclass(frozen=True)
class Blueprint:
    """A prepared model of fake tensors.

    Attributes:
        model: with an adapter, in training mode.
        mode: what its tensors live in.
        weights: what they would take.
    """

    model: nn.Module
    mode: FakeTensorMode
    weights: Weights


def read_model_config(
    model: str | Path | PreTrainedConfig, *, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[PreTrainedConfig, Path]:
    """The configuration of a model, and the folder or name it came from.

    Args:
        model: a folder, its config.json, a name on the hub (config.json alone is downloaded), a name in `SHAPES`, or
            the configuration itself.

    Raises:
        NotAModel, BrokenCheckpoint: there is none that could be read.
    """
    if isinstance(model, PreTrainedConfig):
        return copy.deepcopy(model), Path(model.name_or_path or type(model).__name__)
    path = Path(model).expanduser()
    if path.name == CONFIG_FILE and path.is_file():
        path = path.parent
    if not path.exists() and str(model) in SHAPES:
        return config_of(str(model)), path
    folder = path if path.is_dir() else locate(model, revision=revision, only=(CONFIG_FILE, "*.py"))
    return read_config(folder, trust_remote_code=trust_remote_code), folder


def draw(config: PreTrainedConfig, folder: Path, knobs: Knobs, *, trust_remote_code: bool = False) -> Blueprint:
    """Build a model of fake tensors from its configuration.

    Args:
        config: of transformers; it is changed.
        folder: where it came from, for messages and for the folder's own code.

    Raises:
        InputError: it is no language model, or one without a layer that the knobs name.
    """
    if knobs.vocabulary is not None:
        config.get_text_config(decoder=True).vocab_size = knobs.vocabulary
    quantization, in_four_bits = _settle(config, folder, knobs)
    dtype = getattr(torch, knobs.dtype)
    model: Any = _build(config, folder, dtype, trust_remote_code)
    if quantization is not None:
        quantizer = FourBitQuantizer(quantization, pre_quantized=in_four_bits)
        with torch.device("meta"):
            quantizer.preprocess_model(model)
    model = _adapt(model, knobs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _fill(model, getattr(torch, knobs.adapter_dtype))
    prepare(model, gradient_checkpointing=bool(knobs.checkpointing), fused=False)
    fuse_modules(model)
    assume_loss(model)
    model.train()
    return Blueprint(model, mode, _weigh(model, dtype))


def _settle(config: PreTrainedConfig, folder: Path, knobs: Knobs) -> tuple[QuantConfig | None, bool]:
    """How the weights will be quantized, None for not at all, and whether the folder has them so already."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        if knobs.format == NOT_QUANTIZED:
            return None, False
        return chosen_config(knobs.format, knobs.block_size, knobs.double_quant) or QuantConfig(), False
    if knobs.format == NOT_QUANTIZED:
        raise InputError(f"{folder} is in 4 bits already, so it cannot be left in 16; leave the format out.")
    try:
        found = QuantConfig.from_dict(settings if isinstance(settings, dict) else settings.to_dict())
    except InputError as error:
        raise type(error)(f"{folder} cannot be loaded: {error}") from error
    del config.quantization_config
    return found, True


def _build(config: PreTrainedConfig, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    model_class = find_class(config, folder, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model: Any = model_class._from_config(config, dtype=dtype)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise NotAModel(f"{folder} describes a {model_class.__name__} that cannot be built: {reason}") from error
    if model.get_output_embeddings() is None:
        raise NotAModel(f"{folder} is a {model_class.__name__}, which is no language model with a head over its words.")
    return model


def _adapt(model: Any, knobs: Knobs) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = knobs.target_modules
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=knobs.rank,
        lora_alpha=16,
        lora_dropout=knobs.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, which whoever trains will see
            return get_peft_model(model, settings)
    except ValueError as error:
        raise InputError(
            f"No module of this {type(model).__name__} is named as `target_modules` {knobs.target_modules!r} asks; give"
            " `all-linear`, or names such as [q_proj, v_proj]."
        ) from error


def _fill(model: nn.Module, adapter_dtype: torch.dtype) -> None:
    """Put fake tensors on a fake CPU in the place of those on the meta device, tied parameters once."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            _fill_quantized(module)
        for name, parameter in list(module._parameters.items()):
            if parameter is None or parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                dtype = adapter_dtype if parameter.requires_grad else parameter.dtype
                fake = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                made[id(parameter)] = parameter, nn.Parameter(fake, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _fill_quantized(layer: QuantLinear) -> None:
    """Codes and scales as a loaded layer has them."""
    count, config = layer.in_features * layer.out_features, layer.config
    blocks = block_count(count, config.block_size)
    layer.weight = nn.Parameter(torch.empty((packed_size(count), 1), dtype=torch.uint8), requires_grad=False)
    layer.absmax = torch.empty(blocks, dtype=torch.uint8 if config.double_quant else torch.float32)
    if config.double_quant:
        layer.nested_absmax = torch.empty(block_count(blocks, NESTED_BLOCK_SIZE))
        layer.nested_offset = torch.empty(())
    else:
        layer.nested_absmax = layer.nested_offset = None
    layer.levels = torch.empty(len(config.codebook.levels))


def _weigh(model: nn.Module, dtype: torch.dtype) -> Weights:
    codes = scales = others = adapters = largest = parameters = trainable = 0
    seen = set[int]()
    for module in model.modules():
        quantized = isinstance(module, QuantLinear)
        if isinstance(module, QuantLinear):
            count = module.in_features * module.out_features
            parameters, largest = parameters + count, max(largest, count * dtype.itemsize)
            parts = (module.absmax, module.nested_absmax, module.nested_offset)
            scales += sum(part.nbytes for part in parts if part is not None)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if quantized and tensor is module.weight:
                codes += tensor.nbytes
                continue
            if isinstance(tensor, nn.Parameter):
                parameters += tensor.numel()
            if tensor.requires_grad:
                adapters, trainable = adapters + tensor.nbytes, trainable + tensor.numel()
            else:
                others += tensor.nbytes
    return Weights(codes, scales, others, adapters, largest, parameters, trainable)
