"""What a model is given."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fourbit.data.encode import IGNORED, Encoder
from fourbit.data.recognise import Example
from fourbit.data.templates import NEEDS, TEMPLATES
from fourbit.errors import InputError
from fourbit.generate import render

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    given = copy.deepcopy(tokenizer)
    given.chat_template = CHATML
    return given


def test_a_conversation_is_what_the_template_makes_of_it(chatty: Any) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    prompt = render(chatty, messages, key="k")
    assert prompt.text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (prompt.chat, prompt.key) == (True, "k")
    tokenized = chatty.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert list(prompt.ids) == tokenized["input_ids"]


def test_a_text_gets_what_the_tokenizer_puts_in_front(tokenizer: Any) -> None:
    prompt = render(tokenizer, "Once")
    assert (prompt.text, prompt.chat) == ("Once", False)
    assert list(prompt.ids) == tokenizer("Once")["input_ids"]
    assert prompt.ids[0] == tokenizer.bos_token_id


def test_an_end_that_a_tokenizer_appends_is_taken_off(tokenizer: Any) -> None:
    class Ending:
        eos_token, eos_token_id = "</s>", 2

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *([300] * bool(text)), 2]}

    ending: Any = Ending()
    assert render(ending, "Once").ids == (1, 300)
    assert render(ending, "Once</s>").ids == (1, 300, 2)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([], "is empty"),
        ("\ud800", "half of a surrogate pair"),
        ([{"role": "user", "content": "a\udcff"}], "half of a surrogate pair"),
        ([{"role": "user"}], "needs a role and a content"),
        ([{"role": "user", "content": 3}], "needs a role and a content"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "assistant's already"),
    ],
)
def test_what_is_no_question(asked: Any, says: str, chatty: Any) -> None:
    with pytest.raises(InputError, match=says):
        render(chatty, asked)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('Never') }}", "{{ messages[7]['content'] + 1 }}", "{% for %}"]
)
def test_a_template_that_refuses(template: str, chatty: Any) -> None:
    chatty.chat_template = template
    with pytest.raises(InputError, match=r"chat template refuses this conversation: .+[^.]\.$"):
        render(chatty, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])


def test_system_words_go_to_the_user_where_there_is_no_system_turn(chatty: Any) -> None:
    """As in the data that an adapter was trained on."""
    chatty.chat_template = STRICT
    prompt = render(chatty, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}])
    assert prompt.text == "<|im_start|>user\nBe kind.\n\nHello<|im_end|>\n<|im_start|>assistant\n"


def test_no_template(chatty: Any) -> None:
    chatty.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render(chatty, [{"role": "user", "content": "Hello"}])


def test_nothing_at_all(tokenizer: Any) -> None:
    bare: Any = copy.deepcopy(tokenizer)
    assert render(bare, "").ids == (bare.bos_token_id,)

    class Nothing:
        eos_token, eos_token_id = None, None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": []}

    nothing: Any = Nothing()
    with pytest.raises(InputError, match="prompt is empty"):
        render(nothing, "")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_model_is_asked_as_it_was_trained(name: str, tokenizer: Any) -> None:
    """What it is given are the ids in front of the first that carried loss."""
    taught: Any = copy.deepcopy(tokenizer)
    taught.add_special_tokens({"additional_special_tokens": list(NEEDS.get(name, ()))})
    taught.chat_template = TEMPLATES[name]
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is that?"}]
    answered = (*asked, {"role": "assistant", "content": "A dog. It is big."})
    trained = Encoder(taught, max_length=512).encode(Example(answered, None, "here"))
    start = next(index for index, label in enumerate(trained.labels) if label != IGNORED)
    assert list(render(taught, asked).ids) == trained.input_ids[:start]
    text = Encoder(taught, max_length=512).encode(Example(None, "Once upon", "here"))
    assert [*render(taught, "Once upon").ids, taught.eos_token_id] == text.input_ids
