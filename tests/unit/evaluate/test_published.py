"""The paper's chatbot evaluation comes out of its released ratings. The numbers stand in benchmarks/."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from fourbit.evaluate import bradley_terry, elo, measure_shares, read_ratings
from fourbit.evaluate.ratings import Rating

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/published_ratings.py"))


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "chatbot-eval/ratings-gpt4/vicuna"


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[Rating]:
    return read_ratings(folder / "pairwise")


def test_the_shares_of_chatgpts_score(folder: Path, published: dict[str, Any]) -> None:
    """Every order column within 0.1, which is a printed digit and its rounding twice."""
    shares = {share.model: share for share in measure_shares(read_ratings(folder / "relative-gpt-3.5"), "gpt-3.5")}
    assert len(shares) == 36
    for name, (_, reference_first, model_first, mean) in published["SHARES"].items():
        found = shares[name]
        assert found.mean == pytest.approx(mean, abs=published["SHARE_TOLERANCE"]), name
        if reference_first is not None:
            assert found.reference_first == pytest.approx(reference_first, abs=published["SHARE_TOLERANCE"]), name
            assert found.model_first == pytest.approx(model_first, abs=published["SHARE_TOLERANCE"]), name
    gpt4, assistant = shares["gpt4"], shares["30b-huggingchat"]
    # printed the other way round, as if GPT-4 were helped by being shown second
    assert (round(gpt4.reference_first or 0, 1), round(gpt4.model_first or 0, 1)) == (110.1, 119.4)
    # printed as Vicuna's
    assert abs(assistant.mean - published["MISPRINTED"]["30b-huggingchat"][3]) > 10


def test_a_part_of_the_files_tells_less_but_nothing_false(folder: Path, shared_data: Path) -> None:
    """With two files alone no id tells whose it is; the files of answers do, and a warning says so without them."""
    both = sorted((folder / "relative-gpt-3.5").glob("*65b-guanaco*"))
    answers = [shared_data / "chatbot-eval/generations-vicuna/answer_gpt35.jsonl"]
    (told,) = measure_shares(read_ratings(both, answers=answers), "gpt-3.5", samples=20)
    assert (round(told.reference_first or 0, 1), round(told.model_first or 0, 1)) == (96.7, 101.9)


def test_two_files_alone_bring_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_ratings(sorted((folder / "relative-gpt-3.5").glob("*65b-guanaco*")))
    assert "160 of 160 ratings name their systems in the name of the file only" in caplog.text


def test_the_elo_column(pairs: list[Rating], published: dict[str, Any]) -> None:
    """Within 4 points with 500 matches per order, which is what the paper drew."""
    table = elo(pairs, matches_per_order=500, samples=100)
    found = {row.model: row.elo for row in table}
    assert found.keys() == published["ELO"].keys()
    for name, printed in published["ELO"].items():
        assert found[name] == pytest.approx(printed, abs=published["ELO_TOLERANCE"]), name


@pytest.mark.parametrize("rank", [elo, bradley_terry])
def test_the_ranks_with_all_matches(rank: Any, pairs: list[Rating], published: dict[str, Any]) -> None:
    table = rank(pairs, samples=50)
    assert [row.model for row in table] == list(published["ELO"])
    assert (table.matches, table.prompts, table.dropped) == (4467, 80, 13)
    assert table.shown_first_share == pytest.approx(0.63, abs=0.005)
