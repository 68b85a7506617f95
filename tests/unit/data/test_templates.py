"""Templates that a tokenizer has, gets, or cannot take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fourbit.data.templates import (
    TEMPLATES,
    Refused,
    closing,
    end_of_turn,
    ensure_chat_template,
    ensure_pad_token,
    inner_closing,
    render_turns,
)
from fourbit.errors import InputError

Of = Callable[[str], PreTrainedTokenizerBase]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Bye"},
]


def test_what_the_templates_of_ours_write(tokenizer_of: Of) -> None:
    written = {
        name: tokenizer_of(name).apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
        for name in ("guanaco", "alpaca", "vicuna")
    }
    assert written == {
        "guanaco": "<s>Be brief.\n### Human: Hi\n### Assistant: Ho</s>\n### Human: Bye\n### Assistant:",
        "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response: Ho</s>\n\n"
        "### Instruction:\nBye\n\n### Response:",
        "vicuna": "<s>Be brief.\nUSER: Hi\nASSISTANT: Ho</s>\nUSER: Bye\nASSISTANT:",
    }


@pytest.mark.parametrize("name", ["chatml", "llama-3"])
def test_those_with_markers_write_what_is_published(name: str, tokenizer_of: Of) -> None:
    published = tokenizer_of(name).apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = TEMPLATES[name]
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == published


def test_a_template_is_given_only_where_there_is_none(tokenizer_of: Of, tmp_path: Path) -> None:
    tokenizer: Any = tokenizer_of("chatml")
    own = tokenizer.chat_template
    assert ensure_chat_template(tokenizer) is None
    assert tokenizer.chat_template == own
    tokenizer.chat_template = None
    assert "Guanaco's" in (ensure_chat_template(tokenizer) or "")
    assert ensure_chat_template(tokenizer, name="guanaco") is None
    assert ensure_chat_template(tokenizer, name="chatml") == "The chat template is chatml."
    (tmp_path / "own.jinja").write_text(own)
    ensure_chat_template(tokenizer, name=str(tmp_path / "own.jinja"))
    assert tokenizer.chat_template == own


def test_templates_that_cannot_be_taken(tokenizer_of: Of) -> None:
    tokenizer: Any = tokenizer_of("mistral")
    with pytest.raises(InputError, match="no chat template 'gunaco'; give guanaco, alpaca"):
        ensure_chat_template(tokenizer, name="gunaco")
    with pytest.raises(InputError, match=r"llama-3 needs <\|start_header_id\|>"):
        ensure_chat_template(tokenizer, name="llama-3")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        ensure_chat_template(tokenizer, name="guanaco")


def test_padding_adds_no_token(tokenizer_of: Of) -> None:
    tokenizer: Any = tokenizer_of("guanaco")
    size = len(tokenizer)
    assert ensure_pad_token(tokenizer) == "The tokenizer has no pad token; </s> pads."
    assert (tokenizer.pad_token, len(tokenizer)) == ("</s>", size)
    assert ensure_pad_token(tokenizer) is None
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="neither a pad nor an EOS"):
        ensure_pad_token(tokenizer)


def test_what_ends_a_turn(chat: tuple[str, PreTrainedTokenizerBase, str]) -> None:
    _, tokenizer, end = chat
    ends = end_of_turn(tokenizer)
    assert tokenizer.eos_token_id in ends
    assert tokenizer.convert_tokens_to_ids(end or str(tokenizer.eos_token)) in ends
    assert all(isinstance(each, int) for each in ends)


def test_an_end_of_two_tokens(trl_template: Callable[[str, str], PreTrainedTokenizerBase]) -> None:
    tokenizer = trl_template("cohere2", "<|END_OF_TURN_TOKEN|>")
    assert closing(tokenizer) == "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    ends = tokenizer.convert_tokens_to_ids(["<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"])
    assert sorted(end_of_turn(tokenizer), key=str) == sorted(ends, key=str)


def test_an_end_that_is_another_in_the_middle(
    tokenizer_of: Of, trl_template: Callable[[str, str], PreTrainedTokenizerBase]
) -> None:
    tokenizer = trl_template("gptoss", "<|return|>")
    assert (inner_closing(tokenizer), closing(tokenizer)) == ("<|end|>", "<|return|>")
    plain: Any = tokenizer_of("gemma")  # the next header is no end of this turn
    plain.chat_template = (
        "{% for m in messages %}{{ '<start_of_turn>' if m.role == 'user' }}{{ m.content }}"
        "{{ eos_token if loop.last }}{% endfor %}"
    )
    assert (inner_closing(plain), closing(plain)) == ("", "<eos>")


def test_added_white_space_ends_no_turn(tokenizer_of: Of) -> None:
    tokenizer: Any = tokenizer_of("gemma")
    tokenizer.add_tokens(["\n"])
    tokenizer.chat_template = tokenizer.chat_template.replace("<end_of_turn>", "\\n<end_of_turn>")
    assert closing(tokenizer) == "\n<end_of_turn>"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])


def test_system_turns_that_a_template_refuses_or_leaves_out(tokenizer_of: Of) -> None:
    for name in ("gemma", "mistral", "alpaca, published"):
        text, turns = render_turns(tokenizer_of(name), CONVERSATION[:2], add_generation_prompt=True)
        assert "Be brief.\n\nHi" in text
        assert turns == ({"role": "user", "content": "Be brief.\n\nHi"},)
    _, kept = render_turns(tokenizer_of("chatml"), CONVERSATION)
    assert kept == tuple(CONVERSATION)
    with pytest.raises(Refused, match="alternate"):
        render_turns(tokenizer_of("mistral"), CONVERSATION[2:])


def test_a_template_that_cannot_be_used(tokenizer_of: Of) -> None:
    tokenizer: Any = tokenizer_of("chatml")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match=r"The chat template cannot be used: no\."):
        end_of_turn(tokenizer)
