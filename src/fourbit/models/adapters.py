"""Puts a PEFT adapter on a model, after checking from its file that it belongs there."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fourbit.errors import AdapterMismatch, NonFiniteWeight, NotAModel
from fourbit.models.architecture import ADAPTER_CONFIG_FILE
from fourbit.models.checkpoint import Entry, read_header, read_json
from fourbit.models.values import is_finite
from fourbit.nn.linear import is_transposed_linear

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["attach"]

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")


def attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter in a folder on a model, for inference.

    Raises:
        NotAModel: the folder holds no adapter, or only a pickled one.
        AdapterMismatch: the adapter is for another model; names the module.
        BrokenCheckpoint, NonFiniteWeight: its file is broken.
    """
    settings_file, weights = folder / ADAPTER_CONFIG_FILE, folder / WEIGHTS_FILE
    if not settings_file.is_file():
        raise NotAModel(f"{folder} is no adapter: it holds no {ADAPTER_CONFIG_FILE}.")
    if not weights.is_file():
        raise NotAModel(
            f"{folder} holds no {WEIGHTS_FILE}; an adapter in a pickle (.bin) is not read, as it can run any code."
        )
    kind, entries = read_json(settings_file).get("peft_type"), read_header(weights)
    if kind == "LORA":
        _check(model, entries, folder)
    return _attach(model, folder)


def _attach(model: PreTrainedModel, folder: Path) -> PeftModel:
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, folder)
        except (KeyError, RuntimeError, TypeError, ValueError, re.error) as error:
            reason = " ".join(str(error).split())[:300]
            raise AdapterMismatch(f"The adapter {folder} cannot be put on this model: {reason}") from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise AdapterMismatch(f"The adapter {folder} lacks a part of what its config describes: {warning.message}")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    for name, parameter in adapted.named_parameters():
        is_ours = "lora_" in name or ".modules_to_save." in name
        if is_ours and parameter.is_floating_point() and not is_finite(parameter.detach()):
            raise NonFiniteWeight(f"The tensor {name} of the adapter {folder} holds NaN or infinity.")
    return adapted


def _check(model: nn.Module, entries: list[Entry], folder: Path) -> None:
    """Compare the shape of every part of a LoRA adapter with the module that it adapts."""
    modules, kind = dict(model.named_modules(remove_duplicate=False)), type(model).__name__
    for entry in entries:
        name = entry.name.removeprefix(_PREFIX).replace(".base_layer", "")
        part = _PART.fullmatch(name)
        if part is None:
            continue  # a module that was trained whole: peft compares it
        module = modules.get(part["module"])
        if module is None:
            raise AdapterMismatch(f"The adapter {folder} is for another model: this {kind} has no {part['module']}.")
        sizes = _sizes(module)
        if sizes is None:
            continue
        expected, axis = sizes[part["side"]], 1 if part["side"] == "A" else 0
        if len(entry.shape) != 2 or entry.shape[axis] != expected:
            raise AdapterMismatch(
                f"The adapter {folder} is for another model: {entry.name} has the shape {list(entry.shape)}, and for"
                f" {part['module']} of this {kind} dimension {axis} must be {expected}."
            )


def _sizes(module: nn.Module) -> dict[str, int] | None:
    """What the sides A and B of a LoRA meet on this module; None where it is of a kind that we do not check."""
    if isinstance(module, nn.Linear):
        return {"A": module.in_features, "B": module.out_features}
    if isinstance(module, nn.Embedding):
        return {"A": module.num_embeddings, "B": module.embedding_dim}
    if is_transposed_linear(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return {"A": int(rows), "B": int(columns)}
    return None
