"""Which tokens carry loss, held against the rendered text, for many chat templates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fourbit.data.encode import IGNORED, Encoded, Encoder, Refused
from fourbit.data.recognise import Example, recognise
from fourbit.data.records import read_records
from fourbit.data.templates import ensure_chat_template
from fourbit.errors import InputError

Chat = tuple[str, PreTrainedTokenizerBase, str]

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Spain? Paris.</end>"},
    {"role": "assistant", "content": "The capital is Madrid,\n\nnot Paris. 中文 ü 🙂"},
)


def example(*messages: dict[str, str]) -> Example:
    return Example(tuple(messages), None, "test")


def learned(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each run of tokens that carry loss."""
    runs: list[list[int]] = []
    inside = False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == IGNORED:
            inside = False
            continue
        assert label == token
        if not inside:
            runs.append([])
        runs[-1].append(token)
        inside = True
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def expected(name: str, messages: tuple[dict[str, str], ...], end: str) -> list[str]:
    """Each answer with what the model itself writes around it."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if name == "llama-2":
        return [f" {answer} {end}" for answer in answers]
    if name in ("guanaco", "alpaca", "vicuna", "vicuna, published"):
        return [f" {answer}{end}" for answer in answers]
    if name == "qwen3":
        return [answer + end for answer in answers[:-1]] + [f"<think>\n\n</think>\n\n{answers[-1]}{end}"]
    if name == "alpaca, published":  # ends no turn, so EOS is put behind the last
        return [*answers[:-1], answers[-1] + "</s>"]
    return [answer + end for answer in answers]


def test_each_answer_and_its_end(chat: Chat) -> None:
    name, tokenizer, end = chat
    encoded = Encoder(tokenizer, max_length=4096).encode(example(*TURNS))
    runs = learned(encoded, tokenizer)
    assert runs == expected(name, TURNS, end)


def test_the_ids_are_those_of_the_rendered_text(chat: Chat) -> None:
    """And its beginning is what a generation begins with."""
    _, tokenizer, _ = chat
    encoded = Encoder(tokenizer, max_length=4096).encode(example(*TURNS[:2]))
    rendered = tokenizer.apply_chat_template(list(TURNS[:2]), tokenize=False)
    if chat[0] == "alpaca, published":
        rendered = rendered.rstrip() + "</s>"
    assert encoded.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    asked = tokenizer.apply_chat_template(list(TURNS[:1]), tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    if rendered.startswith(asked):
        first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
        assert encoded.input_ids[:first] == prompt


def test_a_system_turn_is_never_lost_nor_learned(chat: Chat) -> None:
    _, tokenizer, _ = chat
    encoded = Encoder(tokenizer, max_length=4096).encode(example(SYSTEM, *TURNS))
    assert not any("Be brief" in run for run in learned(encoded, tokenizer))
    assert "Be brief." in tokenizer.decode(encoded.input_ids)  # Alpaca's published template would leave it out


def test_everything_on_demand(chat: Chat) -> None:
    _, tokenizer, _ = chat
    encoded = Encoder(tokenizer, max_length=4096, loss_on="all").encode(example(*TURNS))
    assert encoded.labels == encoded.input_ids


def test_what_is_cut_off(chat: Chat) -> None:
    _, tokenizer, _ = chat
    whole = Encoder(tokenizer, max_length=4096).encode(example(*TURNS))
    cut = Encoder(tokenizer, max_length=20).encode(example(*TURNS))
    assert not whole.truncated
    assert cut.truncated
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:20], whole.labels[:20])


WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Co", "Cc", "Cn")), min_size=1, max_size=24
).filter(
    lambda text: not any(mark in text for mark in ("</s>", "</think>"))
)  # which hypothesis does find: EOS, a thought


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_any_conversation(chat: Chat, contents: list[tuple[str, str]]) -> None:
    name, tokenizer, end = chat
    # Templates trim differently: that is not what is tested here.
    contents = [(question.strip() or "?", answer.strip() or "!") for question, answer in contents]
    messages = tuple(
        message
        for question, answer in contents
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    )
    encoded = Encoder(tokenizer, max_length=10**6).encode(example(*messages))
    assert learned(encoded, tokenizer) == expected(name, messages, end)


RAW = st.text(st.sampled_from("ab .,?!\n\t<|>#:/é中🙂"), min_size=1, max_size=24).filter(str.strip)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.tuples(RAW, RAW), min_size=1, max_size=3))
def test_white_space_anywhere(chat: Chat, contents: list[tuple[str, str]]) -> None:
    """Answers that begin or end with it, which templates keep or trim; never is anything of a header learned."""
    name, tokenizer, end = chat
    messages = tuple(
        message
        for question, answer in contents
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    )
    encoded = Encoder(tokenizer, max_length=10**6).encode(example(*messages))
    runs = learned(encoded, tokenizer)
    # As it is, trimmed, or without line feeds in front (Qwen3).
    kept, trimmed, cut = (
        expected(name, tuple({**message, "content": trim(message["content"])} for message in messages), end)
        for trim in (str, str.strip, lambda text: text.lstrip("\n"))
    )
    assert len(runs) == len(kept)
    assert all(run in ways for run, *ways in zip(runs, kept, trimmed, cut, strict=True))


def test_white_space_of_which_a_template_takes_a_part(
    tokenizer_of: Callable[[str], PreTrainedTokenizerBase],
) -> None:
    """Qwen3's takes the line feeds in front, and neither the blank behind them nor the one at the end."""
    tokenizer = tokenizer_of("qwen3")
    encoded = Encoder(tokenizer, max_length=4096).encode(
        example({"role": "user", "content": ":"}, {"role": "assistant", "content": "\n : "})
    )
    assert learned(encoded, tokenizer) == ["<think>\n\n</think>\n\n : <|im_end|>"]


PRINTABLE = st.text(st.sampled_from("What is the capital of France? Paris, yes!"), min_size=1, max_size=24)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.tuples(PRINTABLE, PRINTABLE), min_size=1, max_size=3))
def test_vocabularies_that_add_spaces(pieces_chat: Chat, contents: list[tuple[str, str]]) -> None:
    name, tokenizer, end = pieces_chat
    messages = tuple(
        message
        for question, answer in contents
        for message in (
            {"role": "user", "content": question.strip() or "?"},
            {"role": "assistant", "content": answer.strip() or "!"},
        )
    )
    encoded = Encoder(tokenizer, max_length=10**6).encode(example(*messages))
    rendered = tokenizer.apply_chat_template(list(messages), tokenize=False)
    if name != "alpaca, published":
        assert encoded.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # Spaces are ignored, as the vocabulary adds its own.
    assert [squeezed(run) for run in learned(encoded, tokenizer)] == [
        squeezed(text) for text in expected(name, messages, end)
    ]


def squeezed(text: str) -> str:
    return "".join(text.split())


def test_white_space_that_a_template_trims(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    padded = ({"role": "user", "content": " Hi "}, {"role": "assistant", "content": "\n Hello there. \n"})
    for name, text in (("gemma", "Hello there.<end_of_turn>"), ("chatml", "\n Hello there. \n<|im_end|>")):
        tokenizer = tokenizer_of(name)
        assert learned(Encoder(tokenizer, max_length=99).encode(example(*padded)), tokenizer) == [text]


def test_thoughts_are_learned_where_the_template_keeps_them(
    tokenizer_of: Callable[[str], PreTrainedTokenizerBase],
) -> None:
    tokenizer = tokenizer_of("qwen3")
    thought = {"role": "assistant", "content": "<think>\nIt is in France.\n</think>\n\nParis."}
    encoded = Encoder(tokenizer, max_length=999).encode(example(TURNS[0], thought, TURNS[2], thought))
    assert learned(encoded, tokenizer) == ["Paris.<|im_end|>", thought["content"] + "<|im_end|>"]


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5", "alpaca, published"])
def test_a_thought_that_says_the_answer_already(
    name: str, tokenizer_of: Callable[[str], PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizer_of(name)
    thought = {"role": "assistant", "content": "<think>\nIs it Paris? Paris\n</think>\n\nParis"}
    encoded = Encoder(tokenizer, max_length=999).encode(example(TURNS[0], thought))
    assert learned(encoded, tokenizer) == [thought["content"] + str(tokenizer.eos_token)]


def test_a_template_that_trims_and_ends_nothing(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer: Any = tokenizer_of("alpaca, published")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    twice = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": " Paris\n\nParis "})
    encoded = Encoder(tokenizer, max_length=999).encode(example(*twice, *twice))
    assert learned(encoded, tokenizer) == ["Paris\n\nParis", "Paris\n\nParis</s>"]
    short = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": " a "})
    encoded = Encoder(tokenizer, max_length=999).encode(example(*short))
    assert learned(encoded, tokenizer) == ["a</s>"]


def test_no_token_is_half_header_half_answer(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    """A vocabulary joins two line feeds, and the header of ChatML ends with the first of them."""
    words = ["Hi", "there", "user", "assistant", "\n", "\n\n"]
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<|im_start|>", "<|im_end|>", *words])}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
    bare.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = tokenizer_of("chatml").chat_template
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nthere"}]
    encoded = Encoder(tokenizer, max_length=99).encode(example(*turns))
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert encoded.input_ids[: len(asked)] == asked
    assert encoded.labels[: len(asked)] == [IGNORED] * len(asked)
    assert learned(encoded, tokenizer) == ["\nthere<|im_end|>"]


def test_a_tokenizer_in_python() -> None:
    from transformers import ByT5Tokenizer

    tokenizer: Any = ByT5Tokenizer()
    assert not tokenizer.is_fast
    ensure_chat_template(tokenizer)
    encoded = Encoder(tokenizer, max_length=999).encode(example(*TURNS))
    assert learned(encoded, tokenizer) == [f" {turn['content']}</s>" for turn in TURNS[1::2]]


def test_system_words_never_become_an_answer(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    with pytest.raises(Refused, match="System role"):
        Encoder(tokenizer_of("gemma"), max_length=99).encode(example(SYSTEM, TURNS[1]))


def test_real_answers(stories_model: Path, shared_data: Path) -> None:
    """A real tokenizer and real records: what carries loss spells each answer, and its end."""
    tokenizer: Any = AutoTokenizer.from_pretrained(stories_model)
    ensure_chat_template(tokenizer)
    encoder = Encoder(tokenizer, max_length=10**6)
    examples = recognise(read_records(shared_data / "alpaca" / "alpaca_gpt4style_999.json")).examples[:200]
    for each in examples:
        encoded = encoder.encode(each)
        assert each.messages is not None
        (run,) = learned(encoded, tokenizer)
        # The template trims, and the decoder drops the one space in front.
        assert run.strip() == each.messages[-1]["content"].strip() + "</s>"
        assert (encoded.labels[-1], encoded.labels.count(tokenizer.eos_token_id)) == (tokenizer.eos_token_id, 1)


def test_silent_answers_carry_no_loss(chat: Chat) -> None:
    """Neither their words nor the end of their turn; whatever the template and whatever carries loss besides."""
    name, tokenizer, end = chat
    quiet = Example(TURNS, None, "test", silent=frozenset({1}))
    assert learned(Encoder(tokenizer, max_length=4096).encode(quiet), tokenizer) == expected(name, TURNS, end)[1:]
    nothing = ({"role": "user", "content": "Hi?"}, {"role": "assistant", "content": ""}, *TURNS[2:])
    quiet = Example(nothing, None, "test", silent=frozenset({1}))
    assert learned(Encoder(tokenizer, max_length=4096).encode(quiet), tokenizer) == expected(name, TURNS, end)[1:]
    encoded = Encoder(tokenizer, max_length=4096, loss_on="all").encode(Example(TURNS, None, "test", frozenset({1})))
    runs = learned(encoded, tokenizer)
    assert len(runs) == 2
    assert not any("Paris." in run.split("And of")[0] for run in runs)


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells it.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)
CALLED = (
    {"role": "user", "content": "Weather in Rome?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
        ],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "123456789", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
)


@pytest.mark.parametrize(
    ("name", "eos", "call"),
    [
        ("qwen2_5", "<|im_end|>", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
        ("qwen3", "<|im_end|>", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
        ("llama3_1", "<|eot_id|>", '{"name": "weather", "parameters": {"city": "Rome"}}'),
        ("gptoss", "<|return|>", ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'),
    ],
)  # fmt: skip
def test_calls_are_learned_and_what_tools_answer_is_not(
    name: str, eos: str, call: str, trl_template: Callable[[str, str], PreTrainedTokenizerBase]
) -> None:
    """In the form of each template, with the end of the turn behind a call, which hands over to the tool."""
    tokenizer = trl_template(name, eos)
    encoded = Encoder(tokenizer, max_length=10**6).encode(Example(CALLED, None, "test", tools=TOOLS))
    first, last = learned(encoded, tokenizer)
    assert first == (call if call.endswith("<|call|>") else call + eos)
    assert last.endswith("It is sunny." + eos)
    assert "Tells it." in tokenizer.decode(encoded.input_ids)
    assert encoded.ignored == ()


def test_a_thought_beside_its_answer(trl_template: Callable[[str, str], PreTrainedTokenizerBase]) -> None:
    thought = Example((TURNS[0], {**TURNS[1], "reasoning_content": "It is in France."}), None, "test")
    tokenizer = trl_template("qwen3", "<|im_end|>")
    encoded = Encoder(tokenizer, max_length=999).encode(thought)
    assert learned(encoded, tokenizer) == ["<think>\nIt is in France.\n</think>\n\nParis.<|im_end|>"]
    tokenizer = trl_template("llama3_1", "<|eot_id|>")
    encoded = Encoder(tokenizer, max_length=999).encode(thought)
    assert learned(encoded, tokenizer) == ["Paris.<|eot_id|>"]
    assert encoded.ignored == ("reasoning_content",)


def test_a_call_that_a_template_leaves_out(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    """An answer of nothing else teaches nothing: not even its end, or the model would learn to say nothing."""
    tokenizer = tokenizer_of("chatml")
    encoded = Encoder(tokenizer, max_length=999).encode(Example(CALLED, None, "test", tools=TOOLS))
    assert learned(encoded, tokenizer) == ["It is sunny.<|im_end|>"]
    assert encoded.ignored == ("tool_calls", "tools")


def test_plain_text_is_learned_whole(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizer_of("guanaco")
    encoded = Encoder(tokenizer, max_length=99).encode(Example(None, "Paris is the capital.", "test"))
    assert encoded.labels == encoded.input_ids
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_what_a_template_refuses(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    with pytest.raises(Refused, match="alternate"):
        Encoder(tokenizer_of("mistral"), max_length=99).encode(example(TURNS[0], TURNS[0], TURNS[1]))


def test_a_template_that_changes_answers(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    tokenizer: Any = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(Refused, match="changes the text"):
        Encoder(tokenizer, max_length=99).encode(example(*TURNS))


def test_bad_arguments(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> None:
    with pytest.raises(InputError, match="answers, all"):
        Encoder(tokenizer_of("chatml"), max_length=99, loss_on="prompts")
    tokenizer: Any = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(InputError, match="cannot be used"):
        Encoder(tokenizer, max_length=99)
