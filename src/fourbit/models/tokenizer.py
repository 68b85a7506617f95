"""The tokenizer in a model folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fourbit.errors import BrokenCheckpoint, NotAModel
from fourbit.models.folders import locate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]

VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
"""Without one of these transformers makes up a tokenizer that knows nothing, and says nothing."""


def load_tokenizer(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: a model folder or hub name.
        trust_remote_code: run Python code that comes with it.
        revision: branch, tag or commit on the hub.

    Raises:
        NotAModel: there is none. BrokenCheckpoint: it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = locate(path, revision=revision)
    if not trust_remote_code and not any(found for name in VOCABULARY_FILES for found in folder.glob(name)):
        raise NotAModel(f"{folder} holds no tokenizer (a tokenizer.json, say); copy it there from the original model.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BrokenCheckpoint(f"The tokenizer in {folder} cannot be read: {reason}") from error
    return tokenizer
