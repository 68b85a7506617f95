"""Which layers of a transformers model are put into 4 bits.

All linear layers but the output heads, by the rule that transformers itself applies for bitsandbytes, so that a folder
of ours means the same there. That rule leaves tied weights, the output embeddings, whatever holds the last parameter,
and what a model class keeps in fp32. It misses heads of models with several; those we add by name, and say so in the
folder's config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fourbit.errors import InputError
from fourbit.nn.convert import is_plain_linear, is_skipped, linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HEADS", "Targets", "choose", "read"]

HEADS = frozenset(
    {
        "class_labels_classifier",
        "classifier",
        "embed_out",
        "lm_head",
        "output_projection",
        "qa_outputs",
        "score",
    }
)
"""Names under which output heads go, outside of a model's base."""

LINEAR_BY_ANOTHER_NAME = frozenset({"FalconLinear"})
"""Subclasses of `nn.Linear` that compute the same. bitsandbytes leaves them, so no such model is in 4 bits there."""


@dataclass(frozen=True)
class Targets:
    """What is quantized.

    Attributes:
        names: of the linear layers that are.
        skip: of those that are not, where transformers' own rule would not leave just these; else None.
    """

    names: frozenset[str]
    skip: tuple[str, ...] | None


def choose(model: PreTrainedModel, skip: Sequence[str] | None) -> Targets:
    """Decide for a model in 16 bits.

    Args:
        model: on any device, the meta device included.
        skip: see `QuantConfig.skip`. Tied weights and those a model keeps in fp32 are left whatever it says.

    Raises:
        InputError: there is nothing to quantize, or a name in `skip` that matches nothing.
    """
    layers = _layers(model)
    default = _by_rule(model, layers, None)
    if skip is None:
        names = default - _heads(model, layers)
    else:
        modules = [name for name, _ in model.named_modules()]
        if unmatched := [part for part in skip if not any(is_skipped(name, (part,)) for name in modules)]:
            raise InputError(
                f"No module of {type(model).__name__} is named {unmatched[0]!r}, which `skip` asks to leave."
            )
        left = _tied(model) | {name for name in layers if is_skipped(name, skip)}
        names = _by_rule(model, layers, sorted(left))
    if not names:
        raise InputError(f"There is no linear layer to quantize in this {type(model).__name__}.")
    return Targets(names, None if names == default else tuple(name for name in layers if name not in names))


def read(model: PreTrainedModel, skip: Sequence[str] | None) -> Targets:
    """Decide for a model whose folder is in 4 bits already, from the list that its config gives."""
    layers = _layers(model)
    return Targets(_by_rule(model, layers, skip), None if skip is None else tuple(skip))


def _layers(model: nn.Module) -> list[str]:
    found = linear_layers(model, is_linear=lambda m: is_plain_linear(m) or type(m).__name__ in LINEAR_BY_ANOTHER_NAME)
    return [name for name, _ in found]


def _by_rule(model: PreTrainedModel, layers: Sequence[str], skip: Sequence[str] | None) -> frozenset[str]:
    """What transformers would convert for bitsandbytes, given the list that would stand in its config."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    given = None if skip is None else list(skip)
    patterns = HfQuantizer.get_modules_to_not_convert(model, given, model._keep_in_fp32_modules)
    return frozenset(name for name in layers if should_convert_module(name, patterns))


def _tied(model: PreTrainedModel) -> set[str]:
    keys = {key for pair in model.all_tied_weights_keys.items() for key in pair}
    return {key.rpartition(".")[0] for key in keys}


def _heads(model: nn.Module, layers: Sequence[str]) -> frozenset[str]:
    """Layers outside of the base model whose name says that they are an output head."""
    base = getattr(model, "base_model_prefix", "")
    inside = f"{base}." if base and hasattr(model, base) else None
    return frozenset(
        name
        for name in layers
        if (not name.startswith(inside) if inside else "." not in name) and HEADS & set(name.split("."))
    )
