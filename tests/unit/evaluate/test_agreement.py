"""Agreement against the definitions and published examples, and on simulated raters whose faults are planted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fourbit.errors import InputError, MissingExtra
from fourbit.evaluate.agreement import _kendall, cohen_kappa, fleiss_kappa, measure_agreement
from fourbit.evaluate.raters import read_benchmark, read_raters
from fourbit.evaluate.ratings import Rating

MODELS = "bdac"
"""The best first, so that no verdict is always that of the alphabet."""


def rater(seed: int, *, noise: float, bias: float = 0.0, own: str | None = None, prompts: int = 60) -> list[Rating]:
    """Every pair in both orders. The better one wins, but with `noise` chance decides, with `bias` what is shown first,
    and `own` always wins."""
    generator = np.random.default_rng(seed)
    found = []
    for prompt in range(prompts):
        for one in MODELS:
            for other in MODELS:
                if one == other:
                    continue
                label = 1 if MODELS.index(one) < MODELS.index(other) else 2
                if generator.random() < noise:
                    label = int(generator.integers(1, 4))
                if generator.random() < bias:
                    label = 1
                if own in (one, other):
                    label = 1 if own == one else 2
                found.append(Rating(one, other, label, prompt=str(prompt)))
    return found


def test_fleiss_of_the_textbook() -> None:
    """Two categories used, three raters, four items: worked by hand. Items 3:0, 2:1, 1:2, 0:3 have shares of agreeing
    pairs 1, 1/3, 1/3, 1, mean 2/3; both categories are used half the time, so chance is 1/2: kappa 1/3."""
    counts = np.array([[3, 0, 0], [2, 1, 0], [1, 2, 0], [0, 3, 0]], dtype=float)
    same = ((counts**2).sum(axis=1) - 3) / 6
    sums = np.column_stack([same, np.ones(4), counts]).sum(axis=0, keepdims=True)
    assert fleiss_kappa(sums)[0] == pytest.approx(1 / 3)


def test_cohen_of_the_textbook() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: 0.7 observed, 0.5 by chance."""
    table = np.array([[20, 5, 0, 10, 15, 0, 0, 0, 0]], dtype=float)
    assert cohen_kappa(table)[0] == pytest.approx(0.4)
    assert np.isnan(cohen_kappa(np.array([[9.0, 0, 0, 0, 0, 0, 0, 0, 0]]))[0])


def test_kendall_of_many_rows_is_scipys() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.integers(0, 4, size=(2, 50, 6)).astype(float)  # with ties
    expected = [stats.kendalltau(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(_kendall(one, other), expected, atol=1e-12)


def test_raters_that_say_the_same() -> None:
    found = measure_agreement({"x": rater(0, noise=0.3), "y": rater(0, noise=0.3)}, samples=50)
    (pair,) = found.pairs
    assert pair.same is not None
    assert pair.cohen is not None
    assert pair.kendall is not None
    assert pair.spearman is not None
    assert found.fleiss is not None
    assert (pair.same.value, pair.cohen.value, pair.same.count) == (1.0, pytest.approx(1.0), 360)
    assert (pair.kendall.value, pair.spearman.value, pair.kendall.count) == (1.0, pytest.approx(1.0), 4)
    assert found.fleiss.value == pytest.approx(1.0)
    assert found.notes == ()


def test_the_interval_holds_the_truth_of_independent_raters() -> None:
    """Two raters who guess agree by chance: kappa 0 lies in the interval, which is narrower than 0.4."""
    found = measure_agreement({"x": rater(1, noise=1.0), "y": rater(2, noise=1.0)}, samples=400)
    (pair,) = found.pairs
    assert pair.cohen is not None
    assert found.fleiss is not None
    for kappa in (pair.cohen, found.fleiss):
        assert kappa.low <= 0 <= kappa.high
        assert kappa.low <= kappa.value <= kappa.high
        assert kappa.high - kappa.low < 0.4


def test_a_planted_order_bias_shows() -> None:
    """A rater that takes what is shown first every second time, and one that does not."""
    plain, swayed = rater(3, noise=0.0), rater(3, noise=0.0, bias=0.5)
    found = {row.rater: row for row in measure_agreement({"plain": plain, "swayed": swayed}, samples=100).raters}
    assert found["plain"].flips is not None
    assert found["swayed"].flips is not None
    assert found["plain"].shown_first is not None
    assert found["swayed"].shown_first is not None
    assert (found["plain"].flips.value, found["plain"].shown_first.value, found["plain"].prefers_first) == (0, 0.5, 0)
    # The better one wins where it is shown first; shown second it loses with a chance of 1/2, and the verdicts differ.
    # 360 pairs: a deviation of 0.026, taken four times; the points are 1/2 + 1/2 * 1/2, of 720, with half of that.
    assert found["swayed"].flips.value == pytest.approx(0.5, abs=0.105)
    assert found["swayed"].prefers_first == pytest.approx(0.5, abs=0.105)
    assert found["swayed"].shown_first.value == pytest.approx(0.75, abs=0.053)
    assert found["swayed"].prefers_second == 0


def test_self_preference() -> None:
    """`judge-c` puts its own model, the worst, above all; others give it nothing."""
    found = measure_agreement(
        {"judge-c": rater(4, noise=0.0, own="c"), "x": rater(5, noise=0.0)}, selves={"judge-c": "c"}, samples=50
    )
    judge = found.raters[0]
    assert judge.own == "c"
    assert judge.own_share is not None
    assert judge.self_preference is not None
    assert (judge.own_share.value, judge.self_preference.value, judge.self_preference.count) == (1.0, 1.0, 180)
    with pytest.raises(InputError, match="There is no 'z'"):
        measure_agreement({"x": rater(5, noise=0.0)}, selves={"x": "z"})


def test_the_own_model_is_found_by_its_name() -> None:
    ratings = [Rating("gpt-4", "tiny", 1, prompt=str(n)) for n in range(3)]
    (found,) = measure_agreement({"GPT4-0613": ratings}, samples=20).raters
    assert found.own == "gpt-4"
    assert found.self_preference is None  # nobody else rated it


def test_two_orders_that_contradict_each_other_are_a_tie() -> None:
    one = [Rating("a", "b", 1, prompt="1"), Rating("b", "a", 1, prompt="1")]
    other = [Rating("a", "b", 3, prompt="1")]
    (pair,) = measure_agreement({"x": one, "y": other}, samples=20).pairs
    assert pair.same is not None
    assert (pair.same.value, pair.same.count) == (1.0, 1)
    assert pair.cohen is None  # both always say one thing
    assert pair.kendall is None


def test_majorities_and_benchmarks() -> None:
    people = {f"p{n}": rater(10 + n, noise=0.6) for n in range(3)}
    benchmarks = {"mmlu": {"b": 4.0, "d": 3.0, "a": 2.0, "c": 1.0}, "upside": {"b": 1.0, "d": 2.0, "a": 3.0}}
    found = measure_agreement(
        people | {"judge": rater(20, noise=0.0)}, majorities={"crowd": list(people)}, benchmarks=benchmarks, samples=100
    )
    by_pair = {(pair.first, pair.second): pair for pair in found.pairs}
    crowd, single = by_pair["judge", "crowd"].cohen, by_pair["p0", "judge"].cohen
    assert crowd is not None
    assert single is not None
    assert crowd.value > single.value
    mmlu, upside = by_pair["judge", "mmlu"], by_pair["judge", "upside"]
    assert mmlu.kendall is not None
    assert upside.spearman is not None
    assert (mmlu.kendall.value, mmlu.cohen, upside.spearman.value) == (1.0, None, pytest.approx(-1.0))
    assert (upside.spearman.count, ("mmlu", "upside") in by_pair) == (3, False)
    assert found.notes == ("upside has no score of c.",)


@pytest.mark.parametrize(
    ("ratings", "options", "complaint"),
    [
        ({}, {}, "no ratings"),
        ({"x": [Rating("a", "b", -1, prompt="1")]}, {}, "x has no rating that could be parsed"),
        ({"x": [Rating("a", "b", 1)]}, {}, "names no prompt"),
        ({"x": [Rating("a", "b", 1, prompt="1")]}, {"majorities": {"m": ["y"]}}, "has no rater 'y'"),
        ({"x": [Rating("a", "b", 1, prompt="1")]}, {"majorities": {"x": ["x"]}}, "x is a rater already"),
        ({"x": [Rating("a", "b", 1, prompt="1")]}, {"benchmarks": {"x": {"a": 1.0}}}, "a rater and of a benchmark"),
        ({"x": [Rating("a", "b", 1, prompt="1")]}, {"samples": 3}, "3 resamples"),
    ],
)
def test_what_cannot_be_compared(ratings: dict, options: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        measure_agreement(ratings, **options)


def test_raters_without_a_common_item_are_told_of() -> None:
    one, other = [Rating("a", "b", 1, prompt="1")], [Rating("a", "b", 1, prompt="2")]
    found = measure_agreement({"x": one, "y": other}, samples=20)
    assert found.notes == ("x and y rated no item in common; are prompts and models named alike?",)
    assert (found.fleiss, found.pairs[0].same) == (None, None)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"fourbit\[eval\]"):
        measure_agreement({"x": rater(0, noise=0.1), "y": rater(1, noise=0.1)}, samples=20)


def test_who_rated(tmp_path: Path) -> None:
    votes = tmp_path / "votes.csv"
    votes.write_text("question_id,model_a,model_b,winner,judge\n1,a,b,a,ann\n1,a,b,b,bob\n")
    plain = tmp_path / "gpt.csv"
    plain.write_text("question_id,model_a,model_b,winner\n1,a,B,a\n")
    assert list(read_raters([(None, str(votes)), (None, str(plain))])) == ["ann", "bob", "gpt"]
    found = read_raters([("people", str(votes)), ("judge", str(plain))], names={"B": "b"})
    assert list(found) == ["people/ann", "people/bob", "judge"]
    assert found["judge"][0].second == "b"
    with pytest.raises(InputError, match="given twice"):
        read_raters([("x", str(votes)), ("y", str(votes))])
    with pytest.raises(InputError, match="No rating speaks of 'C'"):
        read_raters([(None, str(votes))], names={"C": "c"})


def test_benchmarks_of_files(tmp_path: Path) -> None:
    path = tmp_path / "mmlu.csv"
    path.write_text("model,score\na,0.5\nb,0.25\n")
    assert read_benchmark(None, str(path)) == {"mmlu": {"a": 0.5, "b": 0.25}}
    path.write_text("model,arc,glue\na,1,2\n")
    assert read_benchmark(None, str(path)) == {"arc": {"a": 1.0}, "glue": {"a": 2.0}}
    for text, complaint in (
        ("name,score\na,1\n", "row 1 names no model"),
        ("model,score\na,high\n", "row 1: score is 'high'"),
        ("model,score\na,nan\n", "it must be a number"),
        ("model,score\na,1\na,2\n", "row 2: a has a score of mmlu already"),
        ("model\na\n", "row 1 has no score"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=complaint):
            read_benchmark(None, str(path))
    with pytest.raises(InputError, match="is no file"):
        read_benchmark(None, str(tmp_path))
