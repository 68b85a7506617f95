"""What is counted, against judges that are made to be biased."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fourbit.evaluate.judge.length import control_length
from fourbit.evaluate.judge.summary import summarize

Make = Callable[..., Any]


def test_counts_of_a_small_case(judgement: Make) -> None:
    said = {(0, 1): "1", (0, 2): "2", (1, 1): "1", (1, 2): "1", (2, 1): "3", (2, 2): "2", (3, 1): "?", (3, 2): "2"}
    found = summarize([judgement(*key, f"Verdict: {word}") for key, word in said.items()], mode="verdict")
    (pair,) = found["pairs"]
    assert (pair["wins"], pair["ties"], pair["losses"], pair["unparsed"]) == (5, 1, 1, 1)
    assert [
        (order["shown_first"], order["wins"], order["ties"], order["losses"], order["unparsed"])
        for order in pair["orders"]
    ] == [("a", 2, 1, 0, 1), ("b", 3, 0, 1, 0)]
    assert pair["share"] == pytest.approx(5.5 / 7)
    assert found["unparsed"] == 1 / 8
    bias = found["order_bias"]
    # of the three that were judged twice, one keeps its winner, one goes by the place, one is a tie only once
    assert (bias["compared"], bias["flipped"], bias["reversed"]) == (3, 2 / 3, 1 / 3)
    assert bias["first_share"] == pytest.approx(3.5 / 7)


def test_both_orders_cancel_a_judge_that_goes_by_the_place(judgement: Make) -> None:
    found = summarize([judgement(n, order, "Verdict: 1") for n in range(30) for order in (1, 2)], mode="verdict")
    (pair,) = found["pairs"]
    assert (pair["share"], pair["low"], pair["high"]) == (0.5, 0.5, 0.5)
    assert pair["length_controlled"]["share"] == pytest.approx(0.5)
    assert found["order_bias"]["first_share"] == 1.0
    assert found["order_bias"]["reversed"] == 1.0


def test_a_planted_order_bias_is_measured(judgement: Make) -> None:
    random = np.random.default_rng(0)
    judgements = [
        judgement(n, order, f"Verdict: {1 if random.random() < 0.63 else 2}") for n in range(400) for order in (1, 2)
    ]
    bias = summarize(judgements, mode="verdict")["order_bias"]
    # the mean of 800 draws: a standard error of 0.017
    assert bias["first_share"] == pytest.approx(0.63, abs=3 * 0.017)
    assert bias["low"] < 0.63 < bias["high"]
    assert bias["high"] - bias["low"] == pytest.approx(2 * 1.96 * 0.017, rel=0.2)


def test_scores_of_a_small_case(judgement: Make) -> None:
    said = {(0, 1): "8 10", (0, 2): "10 9", (1, 1): "5 5", (1, 2): "5 4"}
    found = summarize([judgement(*key, f"Scores: {word}") for key, word in said.items()], mode="scores")
    scores = found["pairs"][0]["scores"]
    assert (scores["first_mean"], scores["second_mean"]) == (26 / 4, 30 / 4)
    assert scores["share_of_second"] == pytest.approx(26 / 30)
    assert scores["shown_first"] == pytest.approx(13 / 15)
    assert scores["shown_second"] == pytest.approx(13 / 15)


def test_nothing_was_parsed(judgement: Make) -> None:
    found = summarize([judgement(0, 1, "?"), judgement(0, 2, "?")], mode="scores")
    assert found["order_bias"] is None
    assert found["pairs"][0]["scores"] is None
    assert summarize([], mode="verdict")["pairs"] == []


def simulated(
    random: np.random.Generator, prompts: int, *, preference: float, by_length: float, longer: float
) -> dict[str, Any]:
    """Verdicts of a judge with a known preference, a known love of length, and a bias for the first place."""
    number = np.repeat(np.arange(prompts), 2)
    order = np.tile([1.0, -1.0], prompts)
    difference = np.repeat(random.normal(longer, 300.0, prompts), 2)
    scale = np.sqrt(np.mean(difference**2))
    chance = 1 / (1 + np.exp(-(preference + by_length * np.tanh(difference / scale) + 0.4 * order)))
    points = (random.random(2 * prompts) < chance).astype(np.float64)
    return {"points": points, "difference": difference, "order": order, "prompts": number}


def test_length_control_finds_the_preference_behind_the_length() -> None:
    found = simulated(np.random.default_rng(1), 3000, preference=0.0, by_length=1.5, longer=200.0)
    controlled = control_length(**found, samples=200)
    assert controlled is not None
    assert found["points"].mean() > 0.58  # 0.5 and twelve standard errors: the raw result favours the longer one
    # logit 0 within 3 standard errors: sqrt(4 / 6000) = 0.026 logits without the covariates, twice that with them
    assert controlled.share == pytest.approx(0.5, abs=3 * 2 * 0.026 / 4)
    assert controlled.low < 0.5 < controlled.high
    assert controlled.length_effect == pytest.approx(1.5, abs=0.25)


def test_its_interval_covers() -> None:
    """Of 200 simulated judges, the 95% interval holds the truth as often as it says, within 3 standard errors."""
    random = np.random.default_rng(2)
    truth = 1 / (1 + np.exp(-0.5))
    inside = 0
    for _ in range(200):
        found = control_length(
            **simulated(random, 80, preference=0.5, by_length=1.0, longer=100.0),
            samples=200,
            seed=int(random.integers(1e9)),
        )
        assert found is not None
        inside += found.low <= truth <= found.high
    assert inside / 200 > 0.95 - 3 * np.sqrt(0.95 * 0.05 / 200)


def test_one_that_wins_everything_stays_finite() -> None:
    order = np.tile([1.0, -1.0], 20)
    prompts = np.repeat(np.arange(20), 2)
    found = control_length(np.ones(40), np.where(prompts % 2, 100.0, -50.0), order, prompts, samples=50)
    assert found is not None
    assert 0.99 < found.share < 1.0
    equal = control_length(np.ones(40), np.zeros(40), order, prompts, samples=50)
    assert equal is not None
    assert 0.99 < equal.share < 1.0
    assert equal.length_effect == pytest.approx(0.0, abs=1e-9)


def test_a_judge_of_length_is_seen_through(judgement: Make) -> None:
    """It takes the longer answer nine times out of ten; that of a is the longer two times out of three."""
    judgements = []
    for n in range(60):
        longer = n % 3 > 0
        wins = longer != (n // 3 % 10 == 0)
        for order in (1, 2):
            said = f"Verdict: {1 if wins == (order == 1) else 2}"
            judgements.append(judgement(n, order, said, (200, 100) if longer else (100, 200)))
    (pair,) = summarize(judgements, mode="verdict")["pairs"]
    assert pair["share"] == pytest.approx((40 * 0.9 + 20 * 0.1) / 60)
    # the likelihood is greatest at θ = 0; the ridge of a hundredth on γ = ln 9 / tanh 1 = 2.9 moves it by less
    controlled = pair["length_controlled"]
    assert controlled["share"] == pytest.approx(0.5, abs=0.005)
    assert controlled["length_effect"] == pytest.approx(np.log(9) / np.tanh(1), abs=0.02)


def test_where_length_and_system_are_one_there_is_no_result() -> None:
    order, prompts = np.tile([1.0, -1.0], 40), np.repeat(np.arange(40), 2)
    points = np.random.default_rng(3).integers(0, 2, 80).astype(np.float64)
    assert control_length(points, np.full(80, 10.0), order, prompts) is None
    nearly = np.repeat(np.random.default_rng(4).normal(10.0, 1.5, 40), 2)
    found = control_length(points, nearly, order, prompts, samples=200)
    assert found is not None
    assert found.high - found.low > 0.6
