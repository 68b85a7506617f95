"""`fourbit eval perplexity` on a real model and held-out text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import fourbit

Run = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path, shared_data: Path) -> Path:
    """A few stories."""
    stories = (shared_data / "tinystories/tinystories_sample.2MiB.txt").read_text(encoding="utf-8")
    path = tmp_path / "stories.txt"
    path.write_text(stories[:6000], encoding="utf-8")
    return path


@pytest.fixture
def adapter(tmp_path: Path, stories_model: Path) -> Path:
    """A LoRA adapter that does something."""
    model = get_peft_model(
        fourbit.load(stories_model), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def scored(done: Any) -> dict[str, Any]:
    """The result of a command that succeeded and said nothing else."""
    assert done.code == 0, done.err
    assert done.err == ""
    return dict(json.loads(done.out))


def test_json(stories_model: Path, text: Path, fourbit_command: Run) -> None:
    found = scored(fourbit_command("eval", "perplexity", stories_model, "--text", text, "--format", "none", "--json"))
    assert {"perplexity", "tokens", "bits_per_byte"} <= set(found)
    assert found["format"] == "none"
    # A model of 260,032 parameters predicts a token out of 512 that much better than by chance.
    assert 2 < found["perplexity"] < 16
    assert 0.3 < found["bits_per_byte"] < 2
    assert 1000 < found["tokens"] < 6000


def test_formats_adapters_and_folders(stories_model: Path, text: Path, adapter: Path, fourbit_here: Run) -> None:
    def score(model: str | Path, *options: str | Path) -> float:
        done = fourbit_here("eval", "perplexity", model, "--text", text, "--dtype", "float32", "--json", *options)
        return float(scored(done)["perplexity"])

    exact = score(stories_model, "--format", "none")
    nf4 = score(stories_model)
    assert exact < nf4 < score(stories_model, "--format", "nf2")
    assert score(stories_model, "--adapter", adapter) != nf4
    assert fourbit_here("quantize", stories_model, "out").code == 0
    assert score("out") == nf4


def test_the_table_fits_a_terminal(stories_model: Path, text: Path, fourbit_here: Run) -> None:
    done = fourbit_here("eval", "perplexity", stories_model, "--text", text)
    assert done.code == 0, done.err
    assert done.err == ""
    assert all(name in done.out for name in ("perplexity", "bits per byte", "tokens", "NF4"))
    assert max(map(len, done.out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--text", "gone.txt"], "gone.txt"),
        (["--text", "empty.txt"], "token"),
        (["--text", "binary.txt"], "binary.txt"),
        (["--text", "broken.jsonl"], "broken.jsonl, line 2"),
        (["--dtype", "float8"], "float8"),
        (["--format", "nf5"], "nf5"),
        (["--sequence-length", "100000"], "100000"),
        (["--stride", "0"], "stride"),
        (["--batch-size", "0"], "batch size"),
        (["--limit-tokens", "0"], "limit"),
        (["--adapter", "no/adapter"], "no/adapter"),
        (["--format", "none", "--block-size", "64"], "none"),
    ],
)
def test_what_makes_no_sense(
    options: list[str], named: str, stories_model: Path, text: Path, tmp_path: Path, fourbit_here: Run
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    (tmp_path / "broken.jsonl").write_text('{"text": "Once"}\n{"text": \n')
    given = options if "--text" in options else ["--text", str(text), *options]
    assert named in fourbit_here("eval", "perplexity", stories_model, *given).complaint


def test_an_adapter_of_another_model(stories_model: Path, text: Path, tmp_path: Path, fourbit_here: Run) -> None:
    config = AutoConfig.from_pretrained(stories_model, hidden_size=128, intermediate_size=344)
    other = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"))
    other.save_pretrained(tmp_path / "adapter")
    assert (
        "adapter" in fourbit_here("eval", "perplexity", stories_model, "--text", text, "--adapter", "adapter").complaint
    )
