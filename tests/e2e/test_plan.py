"""`fourbit plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_json(stories_model: Path, fourbit_command: Run) -> None:
    done = fourbit_command("plan", stories_model, "--memory", "24 GB", "max_length=128", "--json")
    assert done.code == 0, done.err
    keys = json.loads(done.out)
    assert keys["total_bytes"] == sum(keys["parts"].values())
    assert keys["fits"] is True
    assert keys["suggestion"] is None
    assert keys["memory_bytes"] == 24 * 10**9
    assert keys["knobs"]["sequence_length"] == 128
    assert keys["largest_batch_size"] >= keys["knobs"]["batch_size"]
    assert keys["largest_sequence_length"] >= 128


def test_what_does_not_fit_gets_flags_that_do(fourbit_command: Run) -> None:
    given = ("plan", "llama-135m", "--memory", "1GB", "--device", "cuda", "--json")
    keys = json.loads(fourbit_command(*given).out)
    assert keys["fits"] is False
    assert keys["context_bytes"] > 0
    again = json.loads(fourbit_command(*given, *keys["suggestion"].split()).out)
    assert again["fits"] is True
    assert again["needed_bytes"] == keys["suggested_bytes"] <= 10**9


def test_flags_to_copy_are_not_cut_off(fourbit_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    given = ("plan", "tiny", "--memory", "700MB", "--device", "cuda", "--batch-size", "64", "max_length=2048")
    suggestion = json.loads(fourbit_here(*given, "--json").out)["suggestion"]
    assert len(suggestion) > 40
    assert f"  {suggestion}\n" in fourbit_here(*given).out


def test_the_table_has_bars(fourbit_here: Run) -> None:
    done = fourbit_here("plan", "tiny", "--memory", "0.5T", "--batch-size", "2", "--rank", "8")
    assert done.code == 0
    assert "tiny on a" in done.out
    assert "█" in done.out
    assert "It fits into 500 GB." in done.out


def test_what_cannot_be_planned_is_one_sentence(fourbit_here: Run, tmp_path: Path) -> None:
    for arguments, part in (
        (("nosuch",), "There is no folder nosuch"),
        ((tmp_path,), "holds no config.json"),
        (("tiny", "--memory", "24XB"), "--memory is '24XB', which is no size"),
        (("tiny", "--memory", "0"), "--memory is '0'"),
        (("tiny", "max_length=0"), "`max_length` is 0"),
        (("tiny", "--sequence-length", "-8"), "`max_length` is -8"),
        (("tiny", "--batch-size", "0"), "`per_device_train_batch_size` is 0"),
        (("tiny", "--batch-size", "2", "per_device_train_batch_size=4"), "is given twice"),
        (("tiny", "large"), "is no key"),
        (("tiny", "--device", "tpu"), "`device` is 'tpu'"),
    ):
        assert part in fourbit_here("plan", *arguments).complaint
