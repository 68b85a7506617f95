"""Tokenizers with the templates of well-known models."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fourbit.data import templates

TEXT = "What is the capital of France? The capital is Paris. Yes, I do: one, two and three.\n\n### Human: ASSISTANT:\n"


def chat_templates() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chat_templates", Path(__file__).with_name("chat_templates.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KNOWN = chat_templates()
NAMES = [*KNOWN.TEMPLATES, "guanaco", "alpaca", "vicuna"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: any text, byte by byte, spaces at the front of words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: a space is put in front of every text, and behind every special token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # a space only begins a token
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return tokenizer


def make_tokenizer(
    template: str | None, bos: str, eos: str, further: tuple[str, ...], *, tokenizer: Tokenizer
) -> PreTrainedTokenizerBase:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys(["<unk>", bos, eos, *further])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    made.add_special_tokens({"additional_special_tokens": [token for token in further if token not in (bos, eos)]})
    made.chat_template = template
    return made


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], PreTrainedTokenizerBase]:
    """Makes a byte-level tokenizer with the template of that name, a published one or one of ours."""

    def make(name: str) -> PreTrainedTokenizerBase:
        return make_tokenizer(*_template(name), tokenizer=byte_level())

    return make


def _template(name: str) -> tuple[str | None, str, str, tuple[str, ...]]:
    ours = (templates.TEMPLATES.get(name), "<s>", "</s>", ())
    return KNOWN.TEMPLATES.get(name, ours)  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def trl_template() -> Callable[[str, str], PreTrainedTokenizerBase]:
    """Makes a byte-level tokenizer with one of the templates that trl ships, its markers as special tokens."""

    def make(name: str, eos: str) -> PreTrainedTokenizerBase:
        found = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
        if not found.is_file():
            pytest.skip(f"trl {trl.__version__} ships no template {name}")
        template = found.read_text(encoding="utf-8")
        markers = dict.fromkeys(re.findall(r"<[|\uff5c]?[a-zA-Z_\u2581]+[|\uff5c]?>", template))
        further = tuple(marker for marker in markers if "think" not in marker)
        return make_tokenizer(template, "<s>", eos, further, tokenizer=byte_level())

    return make


@pytest.fixture(params=NAMES)
def pieces_chat(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerBase, str]:
    """As `chat`, with the other kind of vocabulary."""
    tokenizer = make_tokenizer(*_template(request.param), tokenizer=pieces())
    return request.param, tokenizer, KNOWN.ENDS[request.param]


@pytest.fixture(params=NAMES)
def chat(
    request: pytest.FixtureRequest, tokenizer_of: Callable[[str], PreTrainedTokenizerBase]
) -> tuple[str, PreTrainedTokenizerBase, str]:
    """The name of a template, a tokenizer with it, and what ends an answer in it."""
    return request.param, tokenizer_of(request.param), KNOWN.ENDS[request.param]
