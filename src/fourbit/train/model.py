"""The model of a run: loaded in 4 bits, prepared, with an adapter that gets gradients."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import torch

from fourbit.errors import InputError
from fourbit.models import adapters
from fourbit.models.folders import locate
from fourbit.models.origin import ModelOrigin
from fourbit.models.prepare import prepare
from fourbit.train.config import TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["count_parameters", "load_trainable"]


def load_trainable(config: TrainConfig) -> PeftModel:
    """The model with a new adapter, or the one that the config names, ready for a training step.

    Raises:
        InputError: the model or the adapter cannot be used, or no module is named as `target_modules` say.
    """
    model = _load_base(config)
    checkpointing: bool | Literal["offload"] = (
        "offload" if config.activation_offloading else config.gradient_checkpointing
    )
    if config.adapter is not None:
        adapted = adapters.attach(model, locate(config.adapter, kind="adapter"))
        _check_shape(config, adapted.peft_config[adapted.active_adapter])
        adapted.set_adapter(adapted.active_adapter)  # attached for inference; this gives it gradients
        adapted.peft_config[adapted.active_adapter].inference_mode = False
        prepare(adapted, gradient_checkpointing=checkpointing)
    else:
        adapted = _adapt(prepare(model, gradient_checkpointing=checkpointing), config)
    _check_head(adapted)
    dtype = getattr(torch, config.adapter_dtype)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def _load_base(config: TrainConfig) -> Any:
    origin = ModelOrigin(
        model=config.model,
        format=config.format,
        block_size=config.block_size,
        double_quant=config.double_quant,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    return origin.load_model()


def _check_shape(config: TrainConfig, settings: Any) -> None:
    """Refuse to go on with an adapter as if it were of another rank or scale."""
    for name, key in (("r", "lora_r"), ("lora_alpha", "lora_alpha")):
        has, asked = getattr(settings, name, None), getattr(config, key)
        if asked not in (has, TrainConfig.__dataclass_fields__[key].default):
            raise InputError(f"`{key}` is {asked}, and the adapter {config.adapter} has {has}; leave `{key}` out.")


def _check_head(adapted: PeftModel) -> None:
    """Refuse an adapter on the output layer, which trl's trainer does not train."""
    model: Any = adapted.get_base_model()
    head = model.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        name = next(name for name, module in model.named_modules() if module is head)
        raise InputError(f"The adapter is on the output layer, {name}, which cannot be trained here; leave it out.")


def _adapt(model: Any, config: TrainConfig) -> PeftModel:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    targets = config.target_modules
    if isinstance(targets, str) and "," in targets:
        targets = [name.strip() for name in targets.split(",")]
    if not targets:
        raise InputError("`target_modules` is empty; give `all-linear`, or names such as [q_proj, v_proj].")
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a whole number by its annotation, any by its use
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    set_seed(config.seed)  # the adapter's first values come from here
    try:
        adapted: PeftModel = get_peft_model(model, settings)
    except ValueError as error:
        if not re.search("target.modules", str(error), flags=re.IGNORECASE):
            raise
        raise InputError(
            f"No module of this {type(model).__name__} is named as `target_modules` {config.target_modules!r} asks;"
            " give `all-linear`, or names such as [q_proj, v_proj]."
        ) from error
    return adapted


def count_parameters(model: Any) -> tuple[int, int]:
    """How many parameters get gradients, and how many there are, those in 4 bits counted one by one."""
    from fourbit.nn.linear import QuantLinear

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantLinear):
            total += module.in_features * module.out_features - module.weight.numel()
    return trainable, total
