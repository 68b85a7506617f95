"""Each token's text and colour, held against the encoder's labels and the rendered text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fourbit.data.colours import CUT, DATA, LOSS, TEMPLATE, colour, spell
from fourbit.data.encode import IGNORED, Encoder
from fourbit.data.recognise import Example
from fourbit.data.templates import ensure_chat_template

TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris 🙂."},
    {"role": "user", "content": "And of Spain? 中文"},
    {"role": "assistant", "content": "Madrid."},
)
UNCUT = 10**6


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return tokenizer_of("chatml")


def runs(example: Example, encoder: Encoder, max_length: int = UNCUT) -> list[tuple[str, str]]:
    tokens = colour(example, encoder, max_length=max_length).tokens
    return [(kind, "".join(token.text for token in run)) for kind, run in groupby(tokens, key=lambda token: token.kind)]


def test_a_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example(TURNS, None, "here", silent=frozenset({2}))
    assert runs(example, Encoder(tokenizer, max_length=UNCUT)) == [
        (TEMPLATE, "<|im_start|>system\n"),
        (DATA, "Be brief."),
        (TEMPLATE, "<|im_end|>\n<|im_start|>user\n"),
        (DATA, "What is the capital of France?"),
        (TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n"),
        (DATA, "Paris 🙂."),
        (TEMPLATE, "<|im_end|>\n<|im_start|>user\n"),
        (DATA, "And of Spain? 中文"),
        (TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n"),
        (LOSS, "Madrid.<|im_end|>"),
        (TEMPLATE, "\n"),
    ]


def test_it_agrees_with_what_is_trained_on(chat: tuple[str, PreTrainedTokenizerBase, str]) -> None:
    _, tokenizer, _ = chat
    example = Example(TURNS[1:], None, "here")
    row = Encoder(tokenizer, max_length=20).encode(example)
    shown = colour(example, Encoder(tokenizer, max_length=UNCUT), max_length=20).tokens
    assert [token.id for token in shown[:20]] == row.input_ids
    assert [token.kind == LOSS for token in shown[1:20]] == [label != IGNORED for label in row.labels[1:]]
    assert {token.kind for token in shown[20:]} == {CUT}
    # All of the text is there, and in its order.
    whole = tokenizer.decode([token.id for token in shown], clean_up_tokenization_spaces=False)
    assert "".join(token.text for token in shown) == whole


def test_plain_text_and_real_tokens(stories_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    ensure_chat_template(tokenizer)
    shown = runs(Example(None, "Once upon a time.", "here"), Encoder(tokenizer, max_length=UNCUT))
    assert [(kind, text.strip()) for kind, text in shown] == [
        (TEMPLATE, "<s>"),
        (LOSS, "Once upon a time.</s>"),
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30))
def test_any_text_is_spelled(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    texts = spell(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
