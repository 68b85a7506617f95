"""A model as it is on disk, for comparing: read and checked the way `load` does, but left in 16 or 32 bits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from fourbit.errors import InputError
from fourbit.models import adapters
from fourbit.models.architecture import find_class, read_config
from fourbit.models.checkpoint import Checkpoint
from fourbit.models.folders import locate
from fourbit.models.loading import build
from fourbit.models.reading import Reader

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["load_unquantized"]


def load_unquantized(
    path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a model without quantizing it.

    Args:
        path, adapter, dtype, trust_remote_code, revision: see `load`.

    Returns:
        the model, in evaluation mode, on the GPU where there is one.

    Raises:
        InputError: the folder is in 4 bits. What `load` raises.
    """
    folder = locate(path, revision=revision)
    model_config = read_config(folder, trust_remote_code=trust_remote_code)
    model_class = find_class(model_config, folder, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.quantized or getattr(model_config, "quantization_config", None) is not None:
        raise InputError(f"{folder} is quantized already; take the 16-bit model, or leave the format out.")
    with Reader(checkpoint) as reader:
        device_map = {"": torch.device("cuda")} if torch.cuda.is_available() else None
        model = build(model_class, model_config, reader.tensors(), folder=folder, dtype=dtype, device_map=device_map)
    model.name_or_path = model.config.name_or_path = os.fspath(path)  # what an adapter names as its base
    return model if adapter is None else adapters.attach(model, locate(adapter, kind="adapter"))
