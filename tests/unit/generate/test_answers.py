"""Answers beside those of transformers, in batches and alone, whole and in pieces."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fourbit
import fourbit.generate.answers as answers_module
from fourbit.errors import InputError
from fourbit.generate import Answer, Prompt, Sampling, generate, generate_batches, load_for_generation, render, stream

DRAWN = Sampling(max_new_tokens=40, temperature=1.0, top_p=0.9, seed=5)


def of_transformers(model: Any, prompt: Prompt, **settings: Any) -> list[int]:
    """The ids that transformers' own `generate` adds to one prompt."""
    ids = torch.tensor([prompt.ids])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0, **settings
    )
    return list(made[0, len(prompt.ids) :].tolist())


def test_greedy_ids_are_those_of_transformers(model: Any, tokenizer: Any, beginnings: list[str]) -> None:
    prompts = [render(tokenizer, text) for text in beginnings]
    answers = generate(model, tokenizer, prompts, settings=Sampling(max_new_tokens=60), batch_size=1)
    assert [list(answer.ids) for answer in answers] == [
        of_transformers(model, prompt, max_new_tokens=60) for prompt in prompts
    ]
    assert len({answer.text for answer in answers}) == len(beginnings)


@pytest.mark.parametrize("batch_size", [2, 5, 64])
@pytest.mark.parametrize("settings", [Sampling(max_new_tokens=60), DRAWN], ids=["greedy", "drawn"])
def test_a_batch_changes_nothing(
    settings: Sampling, batch_size: int, model: Any, tokenizer: Any, beginnings: list[str]
) -> None:
    """In fp32: rounding differs by some 1e-6 between batches, and the likeliest token leads by far more."""
    alone = generate(model, tokenizer, beginnings, settings=settings, batch_size=1)
    assert generate(model, tokenizer, beginnings, settings=settings, batch_size=batch_size) == alone


@pytest.mark.parametrize("settings", [Sampling(max_new_tokens=60), DRAWN], ids=["greedy", "drawn"])
def test_a_batch_that_does_not_fit_is_made_in_halves(
    settings: Sampling, model: Any, tokenizer: Any, beginnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = generate(model, tokenizer, beginnings, settings=settings, batch_size=1)
    sizes: list[int] = []
    decode = answers_module.decode

    def limited(model: Any, prompts: Any, **settings: Any) -> Any:
        sizes.append(len(prompts))
        for made, tokens in enumerate(decode(model, prompts, **settings)):
            if len(prompts) > 3 and made == 20:  # the cache has become too large in the middle of the answers
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield tokens

    monkeypatch.setattr(answers_module, "decode", limited)
    assert generate(model, tokenizer, beginnings, settings=settings, batch_size=6) == alone
    assert sizes == [6, 3, 3, 3, 2]
    assert not any(module.training for module in model.modules())


def test_conversations_and_texts_share_batches(model: Any, tokenizer: Any, beginnings: list[str]) -> None:
    asked = [text if index % 2 else [{"role": "user", "content": text}] for index, text in enumerate(beginnings)]
    settings = Sampling(max_new_tokens=30)
    together = generate(model, tokenizer, asked, settings=settings, batch_size=4)
    assert together == generate(model, tokenizer, asked, settings=settings, batch_size=1)


def test_a_draw_depends_on_the_key_alone(model: Any, tokenizer: Any, beginnings: list[str]) -> None:
    prompts = [render(tokenizer, text, key=text) for text in beginnings]
    forward = generate(model, tokenizer, prompts, settings=DRAWN, batch_size=3)
    backward = generate(model, tokenizer, prompts[::-1], settings=DRAWN, batch_size=4)
    assert backward[::-1] == forward
    again = [render(tokenizer, beginnings[0], key=key) for key in ("a", "b", "a")]
    first, second, third = generate(model, tokenizer, again, settings=DRAWN)
    assert first == third != second


def test_what_is_done_is_left_out_and_the_batches_stay(model: Any, tokenizer: Any, beginnings: list[str]) -> None:
    prompts = [render(tokenizer, text, key=text) for text in beginnings]
    settings = Sampling(max_new_tokens=10)
    whole = list(generate_batches(model, tokenizer, prompts, settings=settings, batch_size=3))
    done = {*whole[0], next(iter(whole[1]))}
    rest = list(generate_batches(model, tokenizer, prompts, settings=settings, batch_size=3, done=done))
    assert rest == [{index: each for index, each in batch.items() if index not in done} for batch in whole[1:]]


def test_the_random_state_is_left_alone(model: Any, tokenizer: Any) -> None:
    before = torch.get_rng_state()
    generate(model, tokenizer, ["Once"], settings=DRAWN)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chat", [False, True])
def test_pieces_join_to_the_answer(chat: bool, model: Any, tokenizer: Any, beginnings: list[str]) -> None:
    for text in beginnings[:5]:
        asked: Any = [{"role": "user", "content": text}] if chat else text
        (whole,) = generate(model, tokenizer, [asked], settings=DRAWN)
        *pieces, answer = stream(model, tokenizer, asked, settings=DRAWN)
        assert answer == whole
        assert "".join(str(piece) for piece in pieces) == whole.text
        assert len(pieces) > 5


def test_a_stream_can_be_left(model: Any, tokenizer: Any) -> None:
    pieces = stream(model, tokenizer, "Once upon a time", settings=Sampling(max_new_tokens=400))
    assert next(pieces)
    pieces.close()
    assert not any(thread.name == "fourbit-stream" for thread in threading.enumerate())


def test_a_stream_raises_what_went_wrong(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(stream(model, tokenizer, "Once"))


def test_stop_strings(model: Any, tokenizer: Any) -> None:
    (whole,) = generate(model, tokenizer, ["Once upon a time"], settings=Sampling(max_new_tokens=60))
    (cut,) = generate(
        model, tokenizer, ["Once upon a time"], settings=Sampling(max_new_tokens=60, stop=("She", "park"))
    )
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text.partition("She")[0]
    assert cut.ids == whole.ids[: cut.tokens]
    *pieces, _ = stream(model, tokenizer, "Once upon a time", settings=Sampling(max_new_tokens=60, stop=("She",)))
    assert "".join(map(str, pieces)) == cut.text


def test_an_end_token_ends_a_row_and_not_the_others(model: Any, tokenizer: Any, beginnings: list[str]) -> None:
    """With a frequent token for the end, rows of one batch end at different lengths."""
    own = model.generation_config.eos_token_id
    (dot,) = tokenizer(".", add_special_tokens=False)["input_ids"][-1:]
    model.generation_config.eos_token_id = [own, dot]
    try:
        answers = generate(model, tokenizer, beginnings, settings=Sampling(max_new_tokens=50), batch_size=8)
        alone = [of_transformers(model, render(tokenizer, text), max_new_tokens=50) for text in beginnings]
    finally:
        model.generation_config.eos_token_id = own
    assert [list(answer.ids) for answer in answers] == alone
    assert len({answer.tokens for answer in answers if answer.finish_reason == "stop"}) > 3


def test_settings_of_the_model_hold(model: Any, tokenizer: Any) -> None:
    """Its penalty for repetition, not its way to draw."""
    prompt = render(tokenizer, "Once upon a time")
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=1.3, do_sample=True, temperature=0.3, top_k=5, num_beams=1, eos_token_id=2
    )
    try:
        (answer,) = generate(model, tokenizer, [prompt], settings=Sampling(max_new_tokens=40))
        expected = of_transformers(model, prompt, max_new_tokens=40)
    finally:
        model.generation_config = own
    assert list(answer.ids) == expected
    assert list(answer.ids) != of_transformers(model, prompt, max_new_tokens=40)


def test_the_end_of_the_context(model: Any, tokenizer: Any, beginnings: list[str]) -> None:
    """The model sees 512 tokens: 505 leave room for 7, 512 for none."""
    base = list(render(tokenizer, "Once upon a time, there was a little girl. " * 60).ids)
    prompts = [Prompt("", tuple(base[:size]), False) for size in (505, 512, 600, 511)]
    prompts += [render(tokenizer, text) for text in beginnings]
    answers = generate(model, tokenizer, prompts, settings=Sampling(max_new_tokens=20), batch_size=16)
    assert [answer.tokens for answer in answers[:4]] == [7, 0, 0, 1]
    too_long = "prompt_too_long"
    assert [answer.finish_reason for answer in answers[:4]] == ["length", too_long, too_long, "length"]
    assert answers[1].text == ""
    assert answers[4:] == generate(model, tokenizer, prompts[4:], settings=Sampling(max_new_tokens=20))
    with pytest.raises(InputError, match=r"has 600 tokens, and this model sees 512"):
        next(stream(model, tokenizer, prompts[2]))


def test_what_cannot_be_answered(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="batch size is 0"):
        generate(model, tokenizer, ["a"], batch_size=0)
    with pytest.raises(InputError, match="another model's tokenizer"):
        generate(model, tokenizer, [Prompt("", (1, 512), False)])
    config = transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(InputError, match="BertForMaskedLM does not continue text"):
        generate(transformers.BertForMaskedLM(config), tokenizer, ["a"])
    assert generate(model, tokenizer, []) == []


def test_damaged_weights(stories_model: Path, tokenizer: Any) -> None:
    damaged = load_for_generation(stories_model, format="none", dtype="float32").model
    with torch.no_grad():
        damaged.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(InputError, match="not numbers"):
        generate(damaged, tokenizer, ["Once"])


def test_in_the_middle_of_training(stories_model: Path, tokenizer: Any, beginnings: list[str]) -> None:
    """A model that is prepared and being trained answers as it would otherwise, and is left as it was."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = fourbit.prepare(fourbit.load(stories_model, dtype=torch.float32))
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config)
    settings = Sampling(max_new_tokens=20)
    model.eval()
    expected = [of_transformers(model, render(tokenizer, text), max_new_tokens=20) for text in beginnings]
    model.train()
    modes = [module.training for module in model.modules()]
    answers = generate(model, tokenizer, beginnings, settings=settings, batch_size=4)
    assert [list(answer.ids) for answer in answers] == expected
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False


def tiny(name: str, **settings: Any) -> Any:
    """A model of another architecture, with random weights that are large enough to tell tokens apart."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
    config_class = getattr(transformers, f"{name}Config")
    kinds = {"GPT2": "GPT2LMHeadModel"}
    config = config_class(
        vocab_size=512, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape | settings
    )
    torch.manual_seed(1)
    return getattr(transformers, kinds.get(name, f"{name}ForCausalLM"))(config).eval()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("GPT2", {}),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("GPTNeoX", {"intermediate_size": 64}),
        ("Gemma2", {"intermediate_size": 64, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 16}),
        ("Qwen3", {"intermediate_size": 64, "head_dim": 8, "num_key_value_heads": 2}),
        ("Falcon", {"alibi": True}),
    ],
)
def test_every_kind_of_position(name: str, settings: dict[str, Any], tokenizer: Any, beginnings: list[str]) -> None:
    """Padding on the left moves no position, whether learned, rotary, ALiBi or in a sliding window."""
    model = tiny(name, **settings)
    prompts = [render(tokenizer, text) for text in beginnings]
    answers = generate(model, tokenizer, prompts, settings=Sampling(max_new_tokens=12), batch_size=5)
    assert [list(answer.ids) for answer in answers] == [
        of_transformers(model, prompt, max_new_tokens=12) for prompt in prompts
    ]


def test_positions_that_are_learned_end(tokenizer: Any) -> None:
    """GPT-2 has no position 65 to look up: who is at the end may not be kept running for the sake of others."""
    model = tiny("GPT2")
    prompts = [Prompt("", tuple(range(3, 3 + size)), False) for size in (60, 5, 63, 30)]
    answers = generate(model, tokenizer, prompts, settings=Sampling(max_new_tokens=20), batch_size=8)
    assert [list(answer.ids) for answer in answers] == [
        of_transformers(model, prompt, max_new_tokens=limit)
        for prompt, limit in zip(prompts, (4, 20, 1, 20), strict=True)
    ]


def test_an_answer_counts_its_tokens() -> None:
    assert Answer("a", (3, 4, 2), "stop").tokens == 3
