"""`fourbit demo` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks

KEYS = {
    "exact_match_before",
    "exact_match_after",
    "exact_match_16bit",
    "tokens_per_second",
    "peak_bytes",
    "report",
}


def test_a_short_demo(fourbit_here: Callable[..., Any], tmp_path: Path) -> None:
    done = fourbit_here("demo", "--max-steps", 4, "--questions", 16, "--json")
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys.keys() >= KEYS
    assert keys["exact_match_before"] < 0.05
    assert (tmp_path / keys["report"]).is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"fourbit-demo"}
    assert "Before: the base only continues text" in done.err
    assert "step 4/4" in done.err
    again = fourbit_here("demo", "--max-steps", 4, "--questions", 16)  # replaces the first
    assert again.code == 0, again.err
    assert "QLoRA" in again.out
    assert "fourbit chat fourbit-demo/base-nf4 --adapter fourbit-demo/qlora" in " ".join(again.out.split())


def test_a_dry_run_writes_nothing(fourbit_command: Callable[..., Any], tmp_path: Path) -> None:
    done = fourbit_command("demo", "--dry-run", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert 5_000_000 <= plan["parameters"] <= 6_000_000
    assert plan["bytes_4bit"] < plan["bytes_16bit"] / 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(fourbit_here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear reader")
    assert "did not write" in fourbit_here("demo", "--output", "mine").complaint
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_no_questions(fourbit_here: Callable[..., Any]) -> None:
    assert "--questions is 0" in fourbit_here("demo", "--questions", 0).complaint


@pytest.mark.slow
def test_the_whole_demo_does_what_it_promises(fourbit_command: Callable[..., Any]) -> None:
    done = fourbit_command("demo", "--json")
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys["exact_match_before"] < 0.05
    assert keys["exact_match_after"] > 0.80
    # One seed, and 320 questions: two scores near 0.95 differ by chance with a standard error of
    # sqrt(2 * 0.95 * 0.05 / 320) = 0.017; three of them are allowed. docs/demo.md has the mean over three seeds.
    assert abs(keys["exact_match_after"] - keys["exact_match_16bit"]) < 0.052
    assert keys["seconds"] < 300
