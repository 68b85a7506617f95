"""`fourbit data` as a user runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
KEYS = {"model", "data", "records", "dropped_records", "examples", "eval_examples", "tokens", "labelled_tokens"}
MORE = {"labelled_share", "max_length", "lengths", "problems", "notes", "checks", "histogram", "sentences", "html"}


@pytest.fixture
def flags(stories_model: Path, shared_data: Path) -> list[str | Path]:
    return ["--model", stories_model, "--data", shared_data / "alpaca" / "alpaca_100.json"]


def test_keys_for_programs(fourbit_here: Run, flags: list[str | Path], tmp_path: Path) -> None:
    """The counts are those that training would print, and the page shows the same."""
    options = ("max_length=128", "packing=true", "eval_size=10")
    done = fourbit_here("data", "lint", *flags, *options, "--json", "--html", "page.html")
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys.keys() == KEYS | MORE | {"packed_rows", "packed_share"}
    outline = json.loads(fourbit_here("train", *flags, *options, "--output", "out", "--dry-run", "--json").out)
    for name in ("examples", "eval_examples", "tokens", "labelled_tokens", "dropped_records", "max_length"):
        assert keys[name] == outline[name], name
    assert keys["packed_rows"] == outline["rows"]
    assert {check["verdict"] for check in keys["checks"]} <= {"ok", "note", "problem"}
    assert keys["problems"] == sum(check["verdict"] == "problem" for check in keys["checks"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert f"<b>{keys['examples']:,}</b>" in page
    assert 'class="t cut"' in page


def test_a_table_for_people(fourbit_here: Run, flags: list[str | Path]) -> None:
    done = fourbit_here("data", "lint", *flags)
    assert done.code == 0, done.err
    assert "end of turn" in done.out
    assert "Lengths in tokens" in done.out
    assert "█" in done.out


def test_a_config_as_train_takes_it(fourbit_here: Run, flags: list[str | Path], tmp_path: Path) -> None:
    _, model, _, data = flags
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\ndata: {data}\noutput: out\nmax_length: 64\nlearning_rate: 1e-4\n"
    )
    done = fourbit_here("data", "lint", "run.yaml", "limit=20", "eval_size=0", "--json")
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert (keys["records"], keys["max_length"]) == (20, 64)
    assert not (tmp_path / "out").exists()


def test_a_preview(fourbit_here: Run, flags: list[str | Path], tmp_path: Path) -> None:
    flags[-1] = shutil.copy(flags[-1], tmp_path / f"{'a-long-name-' * 12}.json")  # no line is broken for it
    done = fourbit_here("data", "preview", *flags, "--count", "2")
    assert done.code == 0, done.err
    assert done.out.count(" with loss\n") == 2
    assert "‹" in done.out  # no terminal, so brackets stand for colours
    assert done.out.count("</s>⟧") == 2
    records = json.loads(fourbit_here("data", "preview", *flags, "--count", "1", "--json").out)["records"]
    (record,) = records
    assert {kind for _, _, kind in record["tokens"]} == {"template", "data", "loss"}


def test_the_demo_data(fourbit_here: Run, tmp_path: Path) -> None:
    """What the demo trains on, and its own model; no data outside the repository is needed."""
    from fourbit.demo.chat import clean_set
    from fourbit.demo.story import MODEL_FOLDER, read_world

    records = clean_set(read_world(MODEL_FOLDER))
    (tmp_path / "lessons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    done = fourbit_here("data", "lint", "--model", MODEL_FOLDER, "--data", "lessons.jsonl", "--json")
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys["records"] == len(records)
    # Manners are repeated there on purpose, so that a few examples outweigh many.
    assert {check["name"] for check in keys["checks"] if check["verdict"] == "problem"} <= {"duplicates", "leakage"}


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{"prompt": "Q" * 200, "completion": "A"}], ("max_length=8",), "no label survives: in 1 of 1 examples"),
        ([{"prompt": "Q" * 200, "completion": "A"}], ("max_length=8", "packing=true"), "no label survives: in 1 of 1"),
        ([{"prompt": "Q" * 200, "completion": "A"}] * 2, ("max_length=1", "loss_on=all"), "it must be 2 or more"),
        ([{"prompt": "Q", "completion": ""}], (), "every one of the 1 records has an empty answer"),
        ([{"prompt": "Q", "completion": "A", "label": False}], (), "all 1 records are left out"),
        ([{"messages": [{"role": ["user"], "content": "a"}]}], (), "line 1: message 1 has the role ['user']"),
        ([{"query": "Q"}], (), "no known kind of record has the fields query"),
        ([{"prompt": "Q", "completion": "A"}], ("assistant_only_loss=true",), "`loss_on` that says this"),
        ([{"prompt": "Q", "completion": "A"}], ("max_length=99999",), "was made for 512 tokens"),
        ([{"prompt": "Q", "completion": "A"}], ("--html", "no/where.html"), "give a file in a folder that exists"),
    ],
)
def test_bad_input(
    rows: list[dict[str, Any]],
    options: tuple[str, ...],
    says: str,
    fourbit_here: Run,
    stories_model: Path,
    tmp_path: Path,
) -> None:
    """One sentence and exit code 2; where training refuses the data, the same sentence."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", stories_model, "--data", "rows.jsonl")
    done = fourbit_here("data", "lint", *flags, *options)
    assert says in done.complaint
    if "--html" not in options:
        assert fourbit_here("train", *flags, *options, "--output", "out").complaint == done.complaint


def test_the_page_is_written_where_nothing_can_be_learned(
    fourbit_here: Run, stories_model: Path, tmp_path: Path
) -> None:
    """It shows why; so do the tokens in it."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Q" * 200, "completion": "A"}) + "\n")
    done = fourbit_here(
        "data", "lint", "--model", stories_model, "--data", "rows.jsonl", "max_length=8", "--html", "a.html"
    )
    assert "no label survives" in done.complaint
    assert "This cannot be trained on." in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_what_the_data_says_is_obeyed(fourbit_here: Run, stories_model: Path, tmp_path: Path) -> None:
    """In a real run: text files whole, marked turns without loss, and a role that the template refuses left out."""
    hi, ho = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho ho ho."}
    rows: list[dict[str, Any]] = [{"messages": [hi, ho]}] * 4
    rows += [{"messages": [hi, ho | {"weight": 0}, hi, ho]}, {"messages": [hi, {"role": "tool", "content": "x"}, ho]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "book.txt").write_text("Once upon a time there was a girl.\n" * 200)
    keys = ("max_steps=1", "samples=0", "max_length=64", "--json", "--output")
    done = fourbit_here("train", "--model", stories_model, "--data", "rows.jsonl", *keys, "out")
    assert done.code == 0, done.err
    assert "Without loss, as the data says so (`weight`, `train`): 1 answers." in done.err
    assert "the role tool is not known here): 1 of 6 examples" in done.err
    done = fourbit_here("train", "--model", stories_model, "--data", "book.txt", *keys, "other")
    assert done.code == 0, done.err
    assert "Recognised plain text: 1 documents" in done.err
    assert json.loads(done.out)["eval_loss"] is not None
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
