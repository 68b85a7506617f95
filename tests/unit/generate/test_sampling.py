"""How the next token is chosen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourbit.errors import InputError
from fourbit.generate import Sampling
from fourbit.generate.sampling import NextToken

NOTHING = torch.zeros((1, 1), dtype=torch.int64)


def draw(settings: Sampling, logits: torch.Tensor, keys: list[str], steps: int) -> torch.Tensor:
    """[steps, B]: the tokens drawn when the logits stay the same."""
    choose = NextToken(settings, keys)
    return torch.stack([choose(NOTHING, logits.clone()).argmax(-1) for _ in range(steps)])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_new_tokens": 0}, "new tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"top_p": 0.9}, "need a temperature above 0"),
        ({"top_k": 5}, "need a temperature above 0"),
        ({"stop": ("a", "")}, "stop string is empty"),
    ],
)
def test_a_value_out_of_range(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Sampling(**values)


def test_greedy_leaves_the_scores_alone() -> None:
    logits = torch.randn(3, 50)
    assert torch.equal(NextToken(Sampling(), ["a", "b", "c"])(NOTHING, logits), logits)


def test_tokens_come_as_often_as_they_should() -> None:
    """Each count is binomial: 20,000 draws lie within 5 standard deviations but once in two million times."""
    logits, steps = torch.tensor([[2.0, 0.0, 1.0, -1.0, -30.0]]), 20_000
    settings = Sampling(temperature=1.7, seed=3)
    counts = torch.bincount(draw(settings, logits, ["x"], steps)[:, 0], minlength=5)
    wanted = torch.softmax(logits[0].double() / 1.7, -1) * steps
    deviation = (wanted * (1 - wanted / steps)).sqrt()
    assert ((counts - wanted).abs() <= 5 * deviation + 1e-3).all()


def test_top_p_and_top_k_leave_the_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(draw(Sampling(temperature=1.0, top_p=0.7), logits, ["x"], 400).flatten().tolist()) == {0, 1}
    assert set(draw(Sampling(temperature=1.0, top_k=3), logits, ["x"], 400).flatten().tolist()) == {0, 1, 2}
    assert set(draw(Sampling(temperature=1.0, top_p=0.01), logits, ["x"], 20).flatten().tolist()) == {0}


def test_a_draw_belongs_to_its_key_and_seed() -> None:
    logits = torch.zeros(1, 1000)
    settings = Sampling(temperature=1.0, seed=7)
    alone = draw(settings, logits, ["b"], 20)[:, 0]
    together = draw(settings, logits.expand(3, -1), ["a", "b", "c"], 20)
    assert torch.equal(together[:, 1], alone)
    assert not torch.equal(together[:, 0], alone)
    assert not torch.equal(draw(Sampling(temperature=1.0, seed=8), logits, ["b"], 20)[:, 0], alone)


def test_what_is_impossible_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even at the ends of what can be drawn: 0, and the last number below 1."""
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    for drawn, token in ((0.0, 1), (1 - 2**-53, 2)):
        choose = NextToken(Sampling(temperature=1.0), ["x"])
        monkeypatch.setattr(choose, "_generators", [SimpleNamespace(random=lambda drawn=drawn: drawn)])
        assert choose(NOTHING, logits).argmax().item() == token


def test_a_tiny_temperature_is_greedy() -> None:
    logits = torch.randn(4, 100)
    tokens = draw(Sampling(temperature=1e-30), logits, list("abcd"), 5)
    assert (tokens == logits.argmax(-1)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers(temperature: float) -> None:
    logits = torch.zeros(2, 10)
    logits[1, 3] = torch.nan
    choose = NextToken(Sampling(temperature=temperature), ["a", "b"])
    choose.check()
    choose(NOTHING, torch.zeros(2, 10))
    choose.check()
    choose(NOTHING, logits)
    choose(NOTHING, torch.zeros(2, 10))  # and what comes after does not hide it
    with pytest.raises(InputError, match="not numbers"):
        choose.check()
