"""Where an answer ends."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from fourbit.data.templates import TEMPLATES
from fourbit.generate import Sampling
from fourbit.generate.endings import find_endings

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
ONCE = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + ZEPHYR
OWN = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 7], stop_strings=["END"]))


@pytest.fixture
def own(tokenizer: Any) -> Any:
    """A tokenizer with ChatML's markers, as a model that knows them has it."""
    given = copy.deepcopy(tokenizer)
    given.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return given


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (TEMPLATES["guanaco"], "### Human:"),
        (TEMPLATES["alpaca"], "### Instruction:"),
        (TEMPLATES["vicuna"], "USER:"),
        (LLAMA_2, "[INST]"),
        (ZEPHYR, "<|user|>"),
        (ONCE, None),
        (TEMPLATES["chatml"], None),
    ],
)
def test_the_header_of_the_next_turn(template: str, header: str | None, own: Any) -> None:
    own.chat_template = template
    found = find_endings(OWN, own, settings=Sampling(stop=("STOP",)), chat=True)
    assert found.stop == tuple(text for text in ("STOP", "END", header) if text)
    own_ends = [own.convert_tokens_to_ids("<|im_end|>")] if "im_end" in template else []
    assert sorted(found.ids) == [2, 7, *own_ends]


def test_a_text_has_no_turns(own: Any) -> None:
    own.chat_template = TEMPLATES["guanaco"]
    found = find_endings(OWN, own, settings=Sampling(stop=("STOP",)), chat=False)
    assert (sorted(found.ids), found.stop) == ([2, 7], ("STOP", "END"))
    own.chat_template = None
    assert find_endings(OWN, own, settings=Sampling(), chat=False).stop == ("END",)
