"""`fourbit elo` and `fourbit agreement` as a person runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def ratings(tmp_path: Path) -> Path:
    """Three models on 30 prompts, in both orders; a is better than b and c, which are alike."""
    path = tmp_path / "ratings.jsonl"
    records = []
    for prompt in range(30):
        for first, second in (("a", "b"), ("b", "a"), ("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")):
            label = 1 + prompt % 2 if "a" not in (first, second) else 1 if first == "a" or prompt % 5 == 0 else 2
            records.append(
                {
                    "id": prompt,
                    "first": first,
                    "second": second,
                    "label": label,
                    "judge": "j",
                    "scores": [8, 6] if label == 1 else [4, 5],
                }
            )
    records.append({"id": 0, "first": "a", "second": "b", "label": -1, "judge": "j"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("method", ["elo", "bradley-terry"])
def test_the_keys(ratings: Path, method: str, fourbit_here: Run, tmp_path: Path) -> None:
    done = fourbit_here("elo", ratings, "--method", method, "--orderings", "200", "--plot", "r.png", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert found["ratings"][0]["model"] == "a"
    assert {"model", "elo", "low", "high", "matches"} <= found["ratings"][0].keys()
    assert found["ratings"][0]["matches"] == 120
    assert found["ratings"][1]["cannot_be_told_apart_from"] == [found["ratings"][2]["model"]]
    assert len(found["pairs"]) == 3
    assert (found["matches"], found["prompts"], found["dropped"]) == (180, 30, 1)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_the_table(ratings: Path, fourbit_command: Run) -> None:
    done = fourbit_command("elo", ratings, "--orderings", "100", "--name", "a=Anna", COLUMNS="90")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("Elo: 180 matches on 30 prompts, in ")
    assert lines[3].split()[:2] == ["1", "Anna"]
    assert "Points of the row against the column, in percent" in lines
    assert "1 ratings could not be parsed, and are left out." in done.out
    assert max(map(len, lines)) <= 90


def test_shares(ratings: Path, fourbit_here: Run) -> None:
    done = fourbit_here("elo", ratings, "--share-of", "a", "--json")
    found = json.loads(done.out)
    assert [share["model"] for share in found["shares"]] == ["b", "c"]
    assert {"reference_first", "model_first", "mean", "low", "high", "judgements"} <= found["shares"][0].keys()
    assert "Scores in percent of those of a" in fourbit_here("elo", ratings, "--share-of", "a").out


def test_agreement(ratings: Path, fourbit_here: Run, tmp_path: Path) -> None:
    votes = tmp_path / "votes.csv"
    lines = [f"{n},a,b,{'a' if n % 3 else 'tie'},{who}" for n in range(30) for who in ("ann", "bob")]
    votes.write_text("question_id,model_a,model_b,winner,judge\n" + "\n".join(lines) + "\n")
    scores = tmp_path / "mmlu.csv"
    scores.write_text("model,score\na,60\nb,50\nc,40\n")
    arguments = ["agreement", f"people={votes}", ratings, "--benchmark", scores]
    arguments += ["--majority", "crowd=people/ann,people/bob", "--samples", "50"]
    done = fourbit_here(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    assert [rater["rater"] for rater in found["raters"]] == ["people/ann", "people/bob", "j", "crowd"]
    pair = next(pair for pair in found["pairs"] if (pair["first"], pair["second"]) == ("people/ann", "people/bob"))
    assert pair["cohen"]["value"] == pytest.approx(1.0)
    assert next(pair for pair in found["pairs"] if pair["second"] == "mmlu" and pair["first"] == "j")["kendall"]
    table = fourbit_here(*arguments)
    assert "Fleiss κ of all raters: " in table.out
    assert "j: of 90 pairs rated in both orders" in " ".join(table.out.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["elo", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["elo", "{ratings}", "--matches-per-order", "0"], "--matches-per-order is '0'"),
        (["elo", "{ratings}", "--matches-per-order", "some"], "must be a number from 1 on, or all"),
        (["elo", "{ratings}", "--orderings", "0"], "orderings is 0"),
        (["elo", "{ratings}", "--model", "a", "--model", "z"], "No rating speaks of 'z'"),
        (["elo", "{ratings}", "--name", "a"], "--name is 'a'; give it as OLD=NEW"),
        (["elo", "{ratings}", "--name", "a=x", "--name", "a=y"], "--name is given twice"),
        (["elo", "{ratings}", "--plot", "r.pdf"], "ends in .png"),
        (["elo", "{ratings}", "--plot", "r.png", "--share-of", "a"], "leave out one of"),
        (["elo", "{ratings}", "--share-of", "z"], "No score is against 'z'"),
        (["elo", "{ratings}", "--method", "bradley-terry", "--matches-per-order", "5"], "is for Elo"),
        (["elo", "{ratings}", "--method", "glicko"], "glicko"),
        (["agreement", "x=nothing"], "nothing does not exist"),
        (["agreement", "{ratings}", "--majority", "m=x"], "has no rater 'x'"),
        (["agreement", "{ratings}", "--benchmark", "nothing.csv"], "nothing.csv is no file"),
    ],
)
def test_bad_input_is_one_sentence(
    ratings: Path, arguments: list[str], complaint: str, fourbit_here: Run, tmp_path: Path
) -> None:
    done = fourbit_here(*[argument.format(ratings=ratings) for argument in arguments])
    assert complaint in done.complaint
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".png"] == []
