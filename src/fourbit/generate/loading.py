"""A model together with what it takes to talk to it: its adapter, and the tokenizer and template of its training."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.data.templates import ensure_chat_template
from fourbit.errors import InputError
from fourbit.generate.answers import context_length
from fourbit.models.architecture import read_config
from fourbit.models.origin import ModelOrigin
from fourbit.models.prepare import fuse_modules
from fourbit.models.tokenizer import VOCABULARY_FILES, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Loaded", "Origin", "find_base", "load_for_generation"]


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


def find_base(folder: str | os.PathLike[str]) -> str | None:
    """The model that an adapter was made for; None where the folder holds no adapter, or a whole model beside it.

    Raises:
        InputError: the adapter does not say it.
    """
    described = Path(folder) / "adapter_config.json"
    if not described.is_file() or (Path(folder) / "config.json").is_file():
        return None
    try:
        base = json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{described} does not say which model the adapter belongs to.") from error
    return str(base)


@dataclass(frozen=True, kw_only=True)
class Origin(ModelOrigin):
    """Which model to talk to, and how to load it, with its tokenizer: that of its adapter where one lies beside it.

    Attributes:
        chat_template: the name of a template to use in place of the tokenizer's own; see `fourbit.data.templates`.

    Raises:
        InputError: settings that are unknown or contradict each other.
    """

    chat_template: str | None = None

    def load(self) -> Loaded:
        """Load everything.

        Raises:
            what `load_model` raises, and what `load_tokenizer` raises here.
        """
        tokenizer, sentences = self.load_tokenizer()
        model = self.load_model()
        fuse_modules(model)
        return Loaded(model, tokenizer, sentences, self.weights(model))

    def load_tokenizer(self) -> tuple[PreTrainedTokenizerBase, tuple[str, ...]]:
        """Only the tokenizer, and what a person should know about its template.

        Raises:
            NotAModel: there is none, or no model. BrokenCheckpoint: it cannot be read. InputError: an unknown template.
        """
        read_config(self.folder(), trust_remote_code=self.trust_remote_code)  # an adapter, say, has a tokenizer too
        adapter = self.adapter_folder()
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
        return context_length(read_config(self.folder(), trust_remote_code=self.trust_remote_code))
