"""Costs: the estimate, and a cap that holds whatever a server does within its word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.evaluate.judge.endpoint import _retry_after as retry_after
from fourbit.evaluate.judge.money import Budget, Prices, estimate, most_prompt_tokens
from fourbit.evaluate.judge.store import Reply


def reply(prompt: int, completion: int, seconds: float = 2.0) -> Reply:
    return Reply("", None, prompt, completion, True, seconds)


def test_an_estimate_by_the_constants_and_by_what_is_known() -> None:
    prices = Prices(2.0, 10.0)
    blind = estimate([4000] * 100, [], prices=prices, max_tokens=1024, concurrency=10)
    assert (blind.prompt_tokens, blind.completion_tokens, blind.most_completion_tokens) == (100_000, 20_000, 102_400)
    assert blind.cost == pytest.approx(0.2 + 0.2)
    assert blind.most_cost == pytest.approx(0.2 + 1.024)
    assert blind.seconds == 60.0
    known = estimate([4000] * 100, [reply(1, 50), reply(1, 150)], prices=Prices(), max_tokens=1024, concurrency=10)
    assert (known.completion_tokens, known.seconds, known.cost) == (10_000, 20.0, None)
    assert estimate([], [], prices=prices, max_tokens=1, concurrency=4).seconds == 0.0


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 64), st.booleans()), max_size=60),
    st.floats(0, 0.5),
    st.integers(1, 5),
)
def test_the_cap_holds(questions: list[tuple[int, int, bool]], cap: float, at_once: int) -> None:
    """Questions of some bytes, answered with as many tokens as allowed, or lost after the server charged the most."""
    budget = Budget(Prices(3.0, 15.0), cap)
    charged, under_way = 0.0, []
    for size, completion, lost in questions:
        cost = budget.most(most_prompt_tokens(size), 64)
        if budget.affords(cost):
            budget.reserved += cost
            under_way.append((size, completion, lost, cost))
        if len(under_way) == at_once:
            size, completion, lost, cost = under_way.pop(0)
            budget.reserved -= cost
            if lost:
                budget.uncertain += cost
                charged += Prices(3.0, 15.0).cost(size, 64)
            else:
                budget.count(reply(size, completion), most_prompt_tokens(size))
                charged += Prices(3.0, 15.0).cost(size, completion)
    assert charged <= budget.committed + 1e-12
    assert budget.committed <= cap + 1e-12


def test_a_server_that_counts_more_is_taken_at_its_word() -> None:
    budget = Budget(Prices(1.0, 1.0), 1.0)
    assert budget.most(100, 0) == pytest.approx(100e-6)
    budget.count(reply(500, 0), 100)
    assert budget.most(100, 0) == pytest.approx(500e-6)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_how_long_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


@given(st.text(max_size=40))
def test_nonsense_in_the_header_is_no_answer(value: str) -> None:
    found = retry_after({"retry-after": value})
    assert found is None or found >= 0
