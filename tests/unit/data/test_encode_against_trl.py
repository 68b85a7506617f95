"""Masks held against trl's: its templates for training mark what the assistant says with a tag of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fourbit.data.encode import IGNORED, Encoder
from fourbit.data.recognise import Example

TURNS = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Spain?"},
    {"role": "assistant", "content": "The capital is Madrid,\n\nnot Paris."},
)
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "deepseekv3": "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "gemma": "<eos>",
    "gemma3": "<eos>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|endoftext|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}


def runs(tokenizer: Any, ids: list[int], carries: list[bool]) -> list[str]:
    """The text of each run of tokens that carry loss."""
    found: list[list[int]] = []
    for before, token, told in zip([False, *carries], ids, carries, strict=False):
        if told and not before:
            found.append([])
        if told:
            found[-1].append(token)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in found]


@pytest.mark.parametrize("name", ENDS)
def test_the_same_up_to_headers_and_line_feeds(name: str, trl_template: Callable[[str, str], Any]) -> None:
    """trl also counts headers in some templates, and what stands behind the end of a turn; nothing else may differ."""
    tokenizer = trl_template(f"{name}_training", ENDS[name])
    encoded = Encoder(tokenizer, max_length=9999).encode(Example(TURNS, None, "test"))
    ours = runs(tokenizer, encoded.input_ids, [label != IGNORED for label in encoded.labels])
    marked = tokenizer.apply_chat_template(
        list(TURNS), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.input_ids == marked["input_ids"]
    theirs = runs(tokenizer, marked["input_ids"], [bool(told) for told in marked["assistant_masks"]])
    assert len(ours) == len(theirs) == 2
    asked = tokenizer.apply_chat_template(list(TURNS[:1]), tokenize=False, add_generation_prompt=True)
    for our, their in zip(ours, theirs, strict=True):
        header, found, behind = their.partition(our)
        assert found
        assert asked.rstrip().removesuffix("<think>").rstrip().endswith(header.strip())
        assert behind.strip() in ("", ENDS[name])
