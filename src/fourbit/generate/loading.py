"""A model together with what it takes to talk to it: its adapter, and the tokenizer and template of its training."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fourbit.data.templates import ensure_chat_template
from fourbit.errors import InputError
from fourbit.generate.answers import context_length
from fourbit.models.architecture import read_config
from fourbit.models.folders import locate
from fourbit.models.loading import load
from fourbit.models.tokenizer import VOCABULARY_FILES, load_tokenizer
from fourbit.models.unquantized import load_unquantized
from fourbit.nn import QuantLinear
from fourbit.quant import QuantConfig
from fourbit.quant.config import COMPUTE_DTYPES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["NOT_QUANTIZED", "Loaded", "Origin", "load_for_generation"]

NOT_QUANTIZED = "none"
_SAMPLED_BYTES = 1 << 20


@dataclass(frozen=True)
class Loaded:
    """A model that can be talked to.

    Attributes:
        model: in evaluation mode, with its adapter.
        tokenizer: with a chat template.
        sentences: what a person should know about how it was loaded.
        weights: what they are in: format, block_size, double_quant, dtype.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    sentences: tuple[str, ...] = ()
    weights: dict[str, Any] = field(default_factory=dict)


def load_for_generation(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    format: str | None = None,
    dtype: str | None = None,
    chat_template: str | None = None,
) -> Loaded:
    """Load a model, its adapter, and the tokenizer with the template it was trained with.

    Args:
        model, adapter, format, dtype, chat_template: see `Origin`, which knows more of them.

    Raises:
        see `Origin.load`.
    """
    return Origin(model=model, adapter=adapter, format=format, dtype=dtype, chat_template=chat_template).load()


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which model to talk to, and how to load it.

    Attributes:
        model: a folder or hub name, in 16 or 4 bits.
        adapter: a PEFT adapter, as a folder or hub name. Where a tokenizer lies beside it, that one is taken.
        format, block_size, double_quant: what to quantize a 16-bit model to, NF4 by default; "none" leaves it. A model
            in 4 bits keeps what it has.
        dtype: what is computed in: "float32", "bfloat16" or "float16". By default bfloat16 on a GPU that has it,
            float16 on another, and float32 on a CPU, where rounding then moves no token between one batch and another.
        chat_template: the name of a template to use in place of the tokenizer's own; see `fourbit.data.templates`.
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
    chat_template: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in COMPUTE_DTYPES:
            raise InputError(f"The dtype is {self.dtype!r}; it must be one of {', '.join(COMPUTE_DTYPES)}.")
        if self.format == NOT_QUANTIZED and (self.block_size is not None or self.double_quant is not None):
            raise InputError("A block size and double quantization go with a format; none quantizes nothing.")
        self._config()

    @property
    def compute_dtype(self) -> str:
        """What is computed in, on this machine."""
        return self.dtype or _default_dtype()

    def load(self) -> Loaded:
        """Load everything.

        Raises:
            what `fourbit.load` raises, and what `load_tokenizer` raises here.
        """
        tokenizer, sentences = self.load_tokenizer()
        dtype = self.compute_dtype
        arguments: dict[str, Any] = {
            "adapter": self.adapter,
            "dtype": getattr(torch, dtype),
            "trust_remote_code": self.trust_remote_code,
            "revision": self.revision,
        }
        if self.format == NOT_QUANTIZED:
            weights = {"format": NOT_QUANTIZED, "block_size": None, "double_quant": None, "dtype": dtype}
            return Loaded(load_unquantized(self.model, **arguments), tokenizer, sentences, weights)
        model = load(self.model, self._config(), **arguments)
        return Loaded(model, tokenizer, sentences, _weights(model) | {"dtype": dtype})

    def load_tokenizer(self) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
        """Only the tokenizer, and what a person should know about its template.

        Raises:
            NotAModel: there is none, or no model. BrokenCheckpoint: it cannot be read. InputError: an unknown template.
        """
        read_config(self._folder(), trust_remote_code=self.trust_remote_code)  # an adapter, say, has a tokenizer too
        adapter = self._adapter_folder()
        if adapter is not None and any(found for name in VOCABULARY_FILES for found in adapter.glob(name)):
            tokenizer = load_tokenizer(adapter, trust_remote_code=self.trust_remote_code)
        else:
            tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust_remote_code, revision=self.revision)
        said = ensure_chat_template(tokenizer, name=self.chat_template)
        return tokenizer, () if said is None else (said,)

    def context_length(self) -> int | None:
        """The most tokens that the model was made for; None where it has no bound.

        Raises:
            NotAModel, BrokenCheckpoint.
        """
        return context_length(read_config(self._folder(), trust_remote_code=self.trust_remote_code))

    def fingerprints(self) -> dict[str, str | None]:
        """Of the files of the model and of the adapter: other weights give others.

        Files beyond some megabytes are sampled, so that it takes no time.
        """
        adapter = self._adapter_folder()
        return {
            "model_files": _fingerprint(self._folder()),
            "adapter_files": None if adapter is None else _fingerprint(adapter),
        }

    def _config(self) -> QuantConfig | None:
        settings = {"format": self.format, "block_size": self.block_size, "double_quant": self.double_quant}
        given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        return QuantConfig(**given) if given and self.format != NOT_QUANTIZED else None

    def _folder(self) -> Path:
        return locate(self.model, revision=self.revision)

    def _adapter_folder(self) -> Path | None:
        return None if self.adapter is None else locate(self.adapter, kind="adapter")


def _default_dtype() -> str:
    if not torch.cuda.is_available():
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _weights(model: Any) -> dict[str, Any]:
    """How the weights of a quantized model are held."""
    config = next(module.config for module in model.modules() if isinstance(module, QuantLinear))
    return {"format": config.format, "block_size": config.block_size, "double_quant": config.double_quant}


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
