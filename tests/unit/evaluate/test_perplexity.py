"""The score against brute force, against lm-evaluation-harness' definition, and its edges.

Tolerance. The models here run in float64, so all that differs from brute force is the loss of a token, which is taken
from logits rounded to fp32: at most 2^-24 |logit| for the target's and for the log-sum of all, and some 2^-22 more
within the softmax. With logits below 64 that is under 2e-5 nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fourbit.errors import InputError
from fourbit.evaluate import measure_perplexity, read_documents
from fourbit.evaluate.losses import TokenLosses
from fourbit.evaluate.perplexity import _windows

PER_TOKEN = 2e-5
TEXTS = ["The quick brown fox jumps over the lazy dog, again and again and again.", "", "Ein Märchen: 🦊!", "x", "ab"]
TOKENS = sum(len(text.encode()) for text in TEXTS)


@torch.no_grad()
def brute_force(model: Any, ids: list[int], length: int, stride: int) -> float:
    """The loss of a document, one forward pass per target, from the definition alone: ids[0] is the prefix."""
    targets, total = len(ids) - 1, 0.0
    for target in range(1, targets + 1):
        if target <= length:
            start = 0
        else:
            end = length + math.ceil((target - length) / stride) * stride
            start = min(end, targets) - length
        logits = model(torch.tensor([ids[start:target]])).logits[0, -1].double()
        assert logits.abs().max() < 64
        total -= float(torch.log_softmax(logits, dim=-1)[ids[target]])
    return total


def rolling_windows(tokens: list[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """`get_rolling_token_windows` of lm-evaluation-harness with context_len=1, and then `make_disjoint_window`."""
    predicted = min(length, len(tokens))
    yield [prefix], tokens[:predicted]
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, length)
        end = predicted + count
        context, continuation = tokens[end - length - 1 : end - 1], tokens[end - count : end]
        yield context[: len(context) - (len(continuation) - 1)], continuation
        predicted += count


@pytest.mark.parametrize(("length", "stride"), [(64, 64), (16, 16), (16, 5), (16, 1), (2, 2), (2, 1)])
def test_it_equals_brute_force(length: int, stride: int, tiny_llama: Any, byte_tokenizer: Any) -> None:
    score = measure_perplexity(tiny_llama, byte_tokenizer, TEXTS, sequence_length=length, stride=stride)
    expected = [
        brute_force(tiny_llama, [256, *byte_tokenizer(text)["input_ids"]], length, stride) for text in TEXTS if text
    ]
    sizes = [len(text.encode()) for text in TEXTS if text]
    assert score.tokens_per_document.tolist() == sizes  # one token per byte
    assert score.bytes_per_document.tolist() == sizes
    np.testing.assert_allclose(score.losses, expected, rtol=0, atol=PER_TOKEN * max(sizes))
    mean = sum(expected) / sum(sizes)
    assert score.perplexity == pytest.approx(math.exp(mean), rel=PER_TOKEN)
    assert score.bits_per_byte == pytest.approx(mean / math.log(2), rel=PER_TOKEN)
    assert (score.sequence_length, score.stride) == (length, stride)


def test_windows_that_do_not_fit_are_scored_in_halves(
    tiny_llama: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sequence_length": 16, "stride": 5, "batch_size": 8}
    whole = measure_perplexity(tiny_llama, byte_tokenizer, TEXTS, **settings)
    rows: list[int] = []
    score = TokenLosses.__call__

    def limited(self: TokenLosses, input_ids: Tensor, targets: Tensor) -> Tensor:
        rows.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, input_ids, targets)

    monkeypatch.setattr(TokenLosses, "__call__", limited)
    found = measure_perplexity(tiny_llama, byte_tokenizer, TEXTS, **settings)
    assert rows[:4] == [8, 4, 2, 2]
    assert rows.count(8) == 1  # the size that fits is kept
    np.testing.assert_allclose(found.losses, whole.losses, rtol=0, atol=PER_TOKEN * TOKENS)


def test_it_equals_brute_force_on_a_real_model(stories_model: Path, shared_data: Path) -> None:
    """fp32: two ways to compute a logit of at most 30 by sums of 172 terms differ by less than 1e-4 here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    text = next(iter(read_documents(next((shared_data / "tinystories").iterdir()), separator="<|endoftext|>")))[:300]
    score = measure_perplexity(model, tokenizer, [text], sequence_length=64, stride=48)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id  # this tokenizer adds it by itself
    expected = brute_force(model, ids, 64, 48)
    assert score.tokens == len(ids) - 1
    assert score.losses[0] == pytest.approx(expected, abs=1e-4 * len(ids))
    assert score.bytes == len(text.encode())


@torch.no_grad()
def test_without_overlap_it_is_the_rolling_likelihood(tiny_llama: Any, byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer(TEXTS[0])["input_ids"]
    total = 0.0
    for context, continuation in rolling_windows(tokens, 256, 16):
        inputs = torch.tensor([(context + continuation)[:-1]])
        logits = torch.log_softmax(tiny_llama(inputs).logits[0].double(), dim=-1)[-len(continuation) :]
        total -= float(logits.gather(1, torch.tensor(continuation)[:, None]).sum())
    score = measure_perplexity(tiny_llama, byte_tokenizer, [TEXTS[0]], sequence_length=16)
    assert score.stride == 16
    assert score.losses[0] == pytest.approx(total, abs=PER_TOKEN * len(tokens))


@given(targets=st.integers(1, 200), length=st.integers(2, 50), data=st.data())
def test_every_target_is_scored_once_with_its_context(targets: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    scored = []
    for window in _windows(0, targets, length, stride):
        assert window.width <= length
        assert 0 <= window.start <= window.first < window.stop <= targets
        scored += range(window.first, window.stop)
        if window.first:
            assert window.stop - window.first <= stride
            assert window.first - window.start >= length - stride
    assert scored == list(range(targets))


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_the_batch_size_changes_nothing(batch_size: int, tiny_llama: Any, byte_tokenizer: Any) -> None:
    def score(batch_size: int) -> Any:
        return measure_perplexity(
            tiny_llama, byte_tokenizer, TEXTS, sequence_length=16, stride=7, batch_size=batch_size
        )

    one, many = score(1), score(batch_size)
    np.testing.assert_allclose(many.losses, one.losses, rtol=0, atol=PER_TOKEN * 80)
    assert many.tokens_per_document.tolist() == one.tokens_per_document.tolist()


def test_a_forward_pass_holds_no_more_than_it_may(tiny_llama: Any, byte_tokenizer: Any) -> None:
    shapes: list[torch.Size] = []
    tiny_llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    measure_perplexity(tiny_llama, byte_tokenizer, TEXTS * 9, sequence_length=32, batch_size=3)
    assert max(shape.numel() for shape in shapes) == 96
    assert max(shape[0] for shape in shapes) > 3  # short documents share the room


class TestPrefix:
    """What stands before the first token."""

    def test_eos_where_there_is_no_bos(self, tiny_llama: Any, byte_tokenizer: Any) -> None:
        tokenizer = clone(byte_tokenizer, bos_token=None)
        score = measure_perplexity(tiny_llama, tokenizer, ["hello"])
        expected = brute_force(tiny_llama, [257, *byte_tokenizer("hello")["input_ids"]], 64, 64)
        assert score.losses[0] == pytest.approx(expected, abs=PER_TOKEN * 5)

    def test_the_first_token_is_context_where_there_is_neither(self, tiny_llama: Any, byte_tokenizer: Any) -> None:
        tokenizer = clone(byte_tokenizer, bos_token=None, eos_token=None)
        score = measure_perplexity(tiny_llama, tokenizer, ["hello", "y"], sequence_length=3, stride=2)
        expected = brute_force(tiny_llama, byte_tokenizer("hello")["input_ids"], 3, 2)
        assert score.tokens_per_document.tolist() == [4]  # and nothing of "y"
        assert score.bytes_per_document.tolist() == [4]
        assert score.losses[0] == pytest.approx(expected, abs=PER_TOKEN * 4)

    @torch.no_grad()
    def test_a_split_first_character_is_context(self, tiny_llama: Any, byte_tokenizer: Any) -> None:
        tokenizer = clone(byte_tokenizer, bos_token=None, eos_token=None)
        score = measure_perplexity(tiny_llama, tokenizer, ["🦊bc"])
        ids = byte_tokenizer("🦊bc")["input_ids"]
        logits = torch.log_softmax(tiny_llama(torch.tensor([ids])).logits[0].double(), dim=-1)
        assert score.tokens == score.bytes == 2
        assert score.losses[0] == pytest.approx(-float(logits[3, ids[4]] + logits[4, ids[5]]), abs=PER_TOKEN * 2)


class TestLimit:
    """Scoring a part of the text."""

    def test_it_cuts_the_last_document(self, tiny_llama: Any, byte_tokenizer: Any) -> None:
        score = measure_perplexity(tiny_llama, byte_tokenizer, ["abcd", "efgh", "ijkl"], limit_tokens=6)
        whole = measure_perplexity(tiny_llama, byte_tokenizer, ["abcd", "ef"])
        assert score.tokens_per_document.tolist() == score.bytes_per_document.tolist() == [4, 2]
        np.testing.assert_allclose(score.losses, whole.losses, atol=PER_TOKEN * 4)

    def test_at_a_whole_character(self, tiny_llama: Any, byte_tokenizer: Any) -> None:
        score = measure_perplexity(tiny_llama, byte_tokenizer, ["ab🦊cd", "ef"], limit_tokens=4)
        assert score.tokens_per_document.tolist() == score.bytes_per_document.tolist() == [2]

    def test_documents_after_it_are_not_read(self, tiny_llama: Any, byte_tokenizer: Any) -> None:
        def documents() -> Iterator[str]:
            yield "abcd"
            raise AssertionError("read too much")

        assert measure_perplexity(tiny_llama, byte_tokenizer, documents(), limit_tokens=4).tokens == 4

    def test_beyond_the_end(self, tiny_llama: Any, byte_tokenizer: Any) -> None:
        assert measure_perplexity(tiny_llama, byte_tokenizer, TEXTS, limit_tokens=10**9).tokens == TOKENS


def test_progress_ends_complete(tiny_llama: Any, byte_tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    measure_perplexity(tiny_llama, byte_tokenizer, TEXTS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (TOKENS, TOKENS)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_the_interval_holds_the_score_and_shrinks(tiny_llama: Any, byte_tokenizer: Any) -> None:
    texts = [f"{number} times {number} makes {number * number}" for number in range(60)]
    few = measure_perplexity(tiny_llama, byte_tokenizer, texts[:15])
    many = measure_perplexity(tiny_llama, byte_tokenizer, texts)
    for score in (few, many):
        low, high = score.interval()
        assert low < score.perplexity < high
    assert np.subtract(*many.interval()[::-1]) < np.subtract(*few.interval()[::-1])


def test_the_model_is_left_as_it_was_and_its_gradients_too(tiny_llama: Any, byte_tokenizer: Any) -> None:
    def gradients(evaluate: bool) -> list[Tensor]:
        tiny_llama.zero_grad()
        ids = torch.arange(40)[None]
        loss = tiny_llama(ids, labels=ids).loss
        if evaluate:
            measure_perplexity(tiny_llama, byte_tokenizer, TEXTS)
        loss.backward()
        return [parameter.grad.clone() for parameter in tiny_llama.parameters()]

    tiny_llama.train()
    tiny_llama.model.layers[1].eval()
    before = [module.training for module in tiny_llama.modules()]
    for plain, disturbed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, disturbed)
    assert [module.training for module in tiny_llama.modules()] == before
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_it_scores(tiny_llama: Any, byte_tokenizer: Any) -> None:
    calm = measure_perplexity(tiny_llama, byte_tokenizer, TEXTS).perplexity
    tiny_llama.config.attention_dropout = 0.9
    tiny_llama.train()
    assert measure_perplexity(tiny_llama, byte_tokenizer, TEXTS).perplexity == calm


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sequence_length": 65}, "made for at most 64"),
        ({"sequence_length": 1}, "at least 2"),
        ({"sequence_length": -5}, "at least 2"),
        ({"stride": 0}, "between 1 and the sequence length, 64"),
        ({"stride": -1}, "between 1"),
        ({"stride": 65}, "between 1"),
        ({"sequence_length": 8, "stride": 9}, "between 1 and the sequence length, 8"),
        ({"limit_tokens": 1}, "at least 2"),
        ({"limit_tokens": -3}, "at least 2"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_a_setting_out_of_range(settings: dict[str, int], says: str, tiny_llama: Any, byte_tokenizer: Any) -> None:
    with pytest.raises(InputError, match=says):
        measure_perplexity(tiny_llama, byte_tokenizer, TEXTS, **settings)


@pytest.mark.parametrize(("documents", "says"), [([], "no tokens"), (["", ""], "no tokens"), (["a"], "1 token to")])
def test_too_little_text(documents: list[str], says: str, tiny_llama: Any, byte_tokenizer: Any) -> None:
    with pytest.raises(InputError, match=says):
        measure_perplexity(tiny_llama, byte_tokenizer, documents)


def test_a_tokenizer_of_another_model(tiny_llama: Any, byte_tokenizer: Any) -> None:
    tokenizer = clone(byte_tokenizer)
    tokenizer.add_tokens(["fox"])
    with pytest.raises(InputError, match="token 258, but the model knows only 258"):
        measure_perplexity(tiny_llama, tokenizer, TEXTS)


def test_a_damaged_model(tiny_llama: Any, byte_tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight[3, 3] = math.nan
    with pytest.raises(InputError, match="damaged"):
        measure_perplexity(tiny_llama, byte_tokenizer, TEXTS)


def test_a_perplexity_beyond_numbers(tiny_llama: Any, byte_tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(1e4)
    with pytest.raises(InputError, match="beyond any number"):
        measure_perplexity(tiny_llama, byte_tokenizer, TEXTS)


def test_a_tokenizer_that_cannot_say_where_its_tokens_lie(tiny_llama: Any, byte_tokenizer: Any) -> None:
    class Slow:
        bos_token_id, eos_token_id, is_fast = 256, 257, False

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": byte_tokenizer(text)["input_ids"]}

    assert measure_perplexity(tiny_llama, Slow(), TEXTS).tokens == TOKENS
    with pytest.raises(InputError, match="Slow"):
        measure_perplexity(tiny_llama, Slow(), TEXTS, limit_tokens=5)


def clone(tokenizer: Any, **changes: Any) -> Any:
    """The same tokenizer with other special tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    tokens = {"bos_token": "<s>", "eos_token": "</s>"} | changes
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in tokens.items() if v is not None})
