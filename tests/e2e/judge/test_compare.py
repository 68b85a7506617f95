"""`fourbit compare`: from a folder of models, adapters and answers to a ranking and a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

PROMPTS = [
    {"question_id": number, "text": f"What did {name} find?"} for number, name in enumerate(("Tim", "Lily", "Sue"))
]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answered(path: Path, text: str, *, prompts: list[dict[str, Any]] = PROMPTS) -> Path:
    return written(path, [{"id": one["question_id"], "prompt": one["text"], "text": text} for one in prompts])


@pytest.fixture
def folder(tmp_path: Path, stories_model: Path, adapter: Path) -> Path:
    """A model, an adapter, the answers of a third system, and a folder that is none of these."""
    folder = tmp_path / "models"
    (folder / "notes").mkdir(parents=True)
    (folder / "base").symlink_to(stories_model)
    (folder / "tuned").symlink_to(adapter)
    (folder / "about.json").write_text("{}")
    answered(folder / "elsewhere.jsonl", "<script>alert(1)</script> A **ball**.")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture
def compare(folder: Path, prompts: Path, tmp_path: Path, fourbit_here: Run) -> Run:
    """Runs `fourbit compare models --prompts prompts.jsonl --output out`, with short answers."""

    def run(*arguments: str | Path, source: Path = folder, asked: Path = prompts, out: Path = tmp_path / "out") -> Any:
        short = ("--max-new-tokens", "8", "--dtype", "float32", "--json")
        return fourbit_here("compare", source, "--prompts", asked, "--output", out, *short, *arguments)

    return run


@pytest.fixture
def judged(compare: Run, server: Any) -> Run:
    """The same, with the judge at the wire."""
    return lambda *arguments, **where: compare("--judge-model", "toy", "--base-url", server.url, *arguments, **where)


def test_a_folder_becomes_a_ranking_and_a_page(judged: Run, server: Any, tmp_path: Path) -> None:
    server.answer = lambda prompt: (
        f"Verdict: {1 + (prompt.index('**ball**') > prompt.index('answer 2'))}"
        if ("**ball**" in prompt)
        else "Verdict: 3"
    )
    done = judged()
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "answers", "ranking.json", "ratings.jsonl", "ratings.jsonl.cache.sqlite", "report.html"
    ]  # fmt: skip
    assert "Neither a model nor an adapter, and left out: notes." in done.err
    keys = json.loads(done.out)
    assert keys["systems"] == ["base", "elsewhere", "tuned"]
    assert keys["to_answer"] == {"base": 3, "tuned": 3}
    assert keys["judgements"] == 3 * 3 * 2
    record = json.loads((out / "ranking.json").read_text())
    ratings = record["rankings"]["toy"]["ratings"]
    assert ratings[0]["model"] == "elsewhere"
    assert ratings[0]["elo"] > ratings[1]["elo"]
    assert record["rankings"] == keys["rankings"]
    assert record["judge"]["order_bias"]["first_share"] == 0.5
    settings = {system["name"]: system["settings"] for system in record["systems"]}
    assert settings["base"]["temperature"] == 0.7
    assert settings["elsewhere"] is None
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; A **ball**." in page
    assert "elsewhere is best" in page
    assert not re.search(r"(?:src|href)=|url\(|@import", page), "the page needs something beside it"

    paid = sum(server.paid.values())
    again = judged()
    assert again.code == 0, again.err
    assert sum(server.paid.values()) == paid
    assert json.loads(again.out)["to_answer"] == {"base": 0, "tuned": 0}
    assert json.loads((out / "ranking.json").read_text()) == record


def test_people_say_it_too(judged: Run, compare: Run, tmp_path: Path) -> None:
    votes = tmp_path / "votes.csv"
    lines = [f"base,{other},model_b,{number}\n" for other in ("tuned", "elsewhere", "gpt-4") for number in range(3)]
    votes.write_text("model_a,model_b,winner,question_id\n" + "".join(lines))
    done = compare("--ratings", votes, "--with-base")
    assert done.code == 0, done.err
    assert "3 votes are left out, as they are about gpt-4." in done.err
    assert [row["model"] for row in json.loads(done.out)["rankings"]["people"]["ratings"]][-1] == "base"
    assert json.loads(done.out)["systems"] == ["base", "elsewhere", "tuned"], "base is the adapter's model already"
    both = judged("--ratings", votes)
    assert both.code == 0, both.err
    assert set(json.loads(both.out)["rankings"]) == {"toy", "people"}
    record = json.loads((tmp_path / "out/ranking.json").read_text())
    assert [pair["first"] for pair in record["agreement"]["pairs"]] == ["toy"]
    assert "Whether the raters agree" in (tmp_path / "out/report.html").read_text()


def test_nobody_has_judged_yet(compare: Run, tmp_path: Path) -> None:
    done = compare()
    assert done.code == 0, done.err
    page = (tmp_path / "out/report.html").read_text()
    assert "Nobody has said yet which answers are better." in page
    assert page.count("<details") == len(PROMPTS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["answers", "ranking.json", "report.html"]


def test_a_judge_that_fails_costs_no_answers(judged: Run, server: Any, tmp_path: Path) -> None:
    server.behave = lambda number, prompt: (401, {"error": {"message": "no such key"}}, {}) if number > 6 else "ok"
    failed = judged("--concurrency", "1")
    assert failed.code == 2, failed.err
    assert "no such key" in failed.err.splitlines()[-1]
    assert not (tmp_path / "out/report.html").exists()
    answers = {path: path.read_bytes() for path in (tmp_path / "out/answers").iterdir()}
    assert len(answers) == 4
    paid, server.behave = sum(server.paid.values()), lambda number, prompt: "ok"
    done = judged()
    assert done.code == 0, done.err
    assert {path: path.read_bytes() for path in (tmp_path / "out/answers").iterdir()} == answers
    assert paid > 0
    assert max(server.paid.values()) == 1


def test_scores_against_a_reference(judged: Run, tmp_path: Path) -> None:
    done = judged("--mode", "scores", "--reference", "elsewhere")
    assert done.code == 0, done.err
    assert json.loads(done.out)["judgements"] == 2 * 3 * 2
    assert {pair["second"] for pair in json.loads((tmp_path / "out/ranking.json").read_text())["judge"]["pairs"]} == {
        "elsewhere"
    }


def test_a_dry_run_writes_and_asks_nothing(judged: Run, server: Any, tmp_path: Path) -> None:
    done = judged("--dry-run")
    assert done.code == 0, done.err
    assert json.loads(done.out)["dry_run"] is True
    assert not (tmp_path / "out").exists()
    assert server.seen == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reference", "base"], ["--judge-model"]),
        (["--max-cost", "3"], ["--judge-model"]),
        (["--base-url", "http://localhost:1/v1"], ["--judge-model"]),
        (["--price-in", "1", "--price-out", "1"], ["--judge-model"]),
        (["--judge-model", "toy", "--reference", "gpt-4"], ["'gpt-4'", "base, elsewhere, tuned"]),
        (["--judge-model", "toy", "--mode", "scores"], ["--reference"]),
        (["--judge-model", "toy", "--mode", "taste"], ["'taste'"]),
        (["--judge-model", "toy", "--price-in", "3"], ["--price-out"]),
        (["--judge-model", "toy"], ["OPENAI_API_KEY"]),
        (["--judge-model", "toy", "--concurrency", "0"], ["concurrency is 0"]),
        (["--ratings", "none.csv"], ["none.csv"]),
        (["--ratings", "others.csv"], ["No vote", "others.csv", "a, b"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--format", "nf5"], ["nf5"]),
    ],
)
def test_bad_arguments(arguments: list[str], words: list[str], compare: Run, tmp_path: Path) -> None:
    (tmp_path / "others.csv").write_text("model_a,model_b,winner\na,b,model_a\n")
    refused = compare(*arguments)
    for word in words:
        assert word in refused.complaint
    assert not (tmp_path / "out").exists()


def test_folders_that_will_not_do(
    compare: Run, folder: Path, stories_model: Path, prompts: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds nothing to compare" in compare(source=empty).complaint
    assert "is a file" in compare(source=prompts).complaint
    assert "does not exist" in compare(source=tmp_path / "none").complaint
    assert "is itself a model" in compare(source=stories_model).complaint
    assert "does not exist" in compare(asked=tmp_path / "none.jsonl").complaint
    assert "is a file" in compare(out=prompts).complaint

    alone = tmp_path / "alone"
    alone.mkdir()
    answered(alone / "only.jsonl", "A cat.")
    assert "one system only, only;" in compare("--judge-model", "toy", source=alone).complaint

    answered(folder / "few.jsonl", "A cat.", prompts=PROMPTS[:1])
    refused = compare().complaint
    assert all(word in refused for word in ("few.jsonl has no answer to prompts 1, 2", "prompts.jsonl", "--common"))
    (folder / "few.jsonl").unlink()
    answered(folder / "base.jsonl", "A cat.")
    assert "Two systems are called 'base'" in compare().complaint
    (folder / "base.jsonl").unlink()
    (folder / "orphan").mkdir()
    (folder / "orphan/adapter_config.json").write_text("{}")
    assert "does not say which model" in compare().complaint
    assert not (tmp_path / "out").exists()


def test_a_kill_between_the_last_two_files(compare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them is written first, the same command takes the folder for its own."""
    from fourbit.evaluate.compare import job

    written, write = [], job.replace_file

    def killed_after_one(path: Path, content: str) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(job, "replace_file", killed_after_one)
    assert compare().code == 130
    monkeypatch.undo()
    done = compare()
    assert done.code == 0, done.err
    assert (tmp_path / "out/report.html").exists()


def test_a_page_that_is_not_ours(compare: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("mine")
    assert "was not written by this command" in compare().complaint
    assert (tmp_path / "out/report.html").read_text() == "mine"


def test_other_settings_are_refused(compare: Run, tmp_path: Path) -> None:
    assert compare().code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out/answers").iterdir()}
    assert "seed 0, and now it is 1" in compare("--seed", "1").complaint
    assert {path: path.read_bytes() for path in (tmp_path / "out/answers").iterdir()} == before
    assert compare("--seed", "1", "--overwrite").code == 0
