"""Which model a verb works on, and how it is to be loaded: in 4 bits or as it is, with an adapter or without."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourbit.errors import InputError
from fourbit.models.folders import locate
from fourbit.models.loading import load
from fourbit.models.unquantized import load_unquantized
from fourbit.nn import QuantLinear
from fourbit.quant.config import COMPUTE_DTYPES, NOT_QUANTIZED, chosen_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["ModelOrigin"]

_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ModelOrigin:
    """A model's name, and how to load it.

    Attributes:
        model: a folder or hub name, in 16 or 4 bits.
        adapter: a PEFT adapter, as a folder or hub name.
        format, block_size, double_quant: what to quantize a 16-bit model to, NF4 by default; "none" leaves it. A model
            in 4 bits keeps what it has.
        dtype: what is computed in: "float32", "bfloat16" or "float16". By default bfloat16 on a GPU that has it,
            float16 on another, and float32 on a CPU, where rounding then moves no token between one batch and another.
        trust_remote_code: run Python code that comes with the model.
        revision: branch, tag or commit of a hub model.

    Raises:
        InputError: settings that are unknown or contradict each other.
    """

    model: str | os.PathLike[str]
    adapter: str | os.PathLike[str] | None = None
    format: str | None = None
    block_size: int | None = None
    double_quant: bool | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in COMPUTE_DTYPES:
            raise InputError(f"The dtype is {self.dtype!r}; it must be one of {', '.join(COMPUTE_DTYPES)}.")
        chosen_config(self.format, self.block_size, self.double_quant)

    @property
    def compute_dtype(self) -> str:
        """What is computed in, on this machine."""
        if self.dtype is not None:
            return self.dtype
        if not torch.cuda.is_available():
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"

    def load_model(self) -> PreTrainedModel | PeftModel:
        """Load the model and its adapter, in evaluation mode.

        Raises:
            what `fourbit.load` raises.
        """
        arguments: dict[str, Any] = {
            "adapter": self.adapter,
            "dtype": getattr(torch, self.compute_dtype),
            "trust_remote_code": self.trust_remote_code,
            "revision": self.revision,
        }
        if self.format == NOT_QUANTIZED:
            return load_unquantized(self.model, **arguments)
        return load(self.model, chosen_config(self.format, self.block_size, self.double_quant), **arguments)

    def weights(self, model: torch.nn.Module) -> dict[str, Any]:
        """What the weights of the loaded model are in: format, block_size, double_quant, dtype."""
        used: dict[str, Any] = {"format": NOT_QUANTIZED, "block_size": None, "double_quant": None}
        if self.format != NOT_QUANTIZED:
            held = next(module.config for module in model.modules() if isinstance(module, QuantLinear))
            used = {"format": held.format, "block_size": held.block_size, "double_quant": held.double_quant}
        return used | {"dtype": self.compute_dtype}

    def folder(self) -> Path:
        """Where the model's files lie.

        Raises:
            NotAModel: there are none.
        """
        return locate(self.model, revision=self.revision)

    def adapter_folder(self) -> Path | None:
        """Where the adapter's files lie; None without one.

        Raises:
            NotAModel: there are none.
        """
        return None if self.adapter is None else locate(self.adapter, kind="adapter")

    def fingerprints(self) -> dict[str, str | None]:
        """Of the files of the model and of the adapter: other weights give others, another place does not.

        Files beyond some megabytes are sampled, so that it takes no time.
        """
        adapter = self.adapter_folder()
        return {
            "model_files": _fingerprint(self.folder()),
            "adapter_files": None if adapter is None else _fingerprint(adapter),
        }


def _fingerprint(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    names = {path for pattern in ("*.safetensors", "*config.json", "tokenizer*") for path in folder.glob(pattern)}
    for path in sorted(path for path in names if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for place in sorted({0, size // 4, size // 2, max(0, size - _SAMPLED_BYTES)}):
                file.seek(place)
                digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()
