"""`fourbit bench`: that it measures, what it prints, what it refuses. Numbers of --quick mean nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourbit.bench.run import Run as Measured

Run = Callable[..., Any]


@pytest.mark.slow
def test_all_of_our_operations_run(fourbit_here: Run) -> None:
    done = fourbit_here("bench", "--what", "ops", "--peers", "none", "--quick", "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    found = json.loads(done.out)
    ours = [row for row in found["rows"] if row["contender"].startswith("fourbit")]
    assert {row["case"] for row in found["rows"]} == {row["case"] for row in ours}
    assert found["notes"] == []  # in particular, our contenders agree with each other
    for row in found["rows"]:
        assert 0 < row["minimum"] <= row["median"] <= row["maximum"]
        assert row["samples"] == 1
        assert row["peak_rss_bytes"] >= row["ready_rss_bytes"] > 0
        assert row["torch"]
        assert row["cpu"]
        assert row["contender"].partition(",")[0] != "bitsandbytes"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["quantize,linear-1", "load", "step-checkpointing"])
def test_the_peer_runs_and_agrees(what: str, fourbit_here: Run) -> None:
    pytest.importorskip("bitsandbytes")
    done = fourbit_here("bench", "--what", what, "--quick", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["notes"] == []
    measured = {(row["case"], row["contender"].partition(",")[0]) for row in found["rows"]}
    assert all((case, "bitsandbytes") in measured for case, _ in measured)
    assert {bar["case"] for bar in found["bars"]} == {case for case, _ in measured}


def test_a_table_for_people(fourbit_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = fourbit_here("bench", "--what", "quantize", "--peers", "none", "--quick")
    assert done.code == 0, done.err
    assert "quantize to NF4" in done.out
    assert "limit: copy" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_a_dry_run_only_tells(fourbit_here: Run) -> None:
    done = fourbit_here("bench", "--dry-run", "--json")
    assert done.code == 0, done.err
    cases = json.loads(done.out)["cases"]
    assert "bitsandbytes, lean" in cases["step"]
    alone = json.loads(fourbit_here("bench", "--dry-run", "--peers", "none", "--json").out)["cases"]
    assert alone["load"] == ["fourbit", "fourbit, from_pretrained"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--what", "speed"], "'speed'"),
        (["--shape", "lama-7b"], "no model shape named 'lama-7b'; the shapes are"),
        (["--shape", "llama-7b", "--what", "ops"], "'ops' cannot be measured; choose from step, decode, memory"),
        (["--shape", "llama-7b", "--layers", "33"], "llama-7b has 32 layers, and 33 were asked for"),
        (["--shape", "llama-7b", "--repeats", "0"], "at least 1"),
        (["--layers", "2"], "name one with --shape"),
        (["--peers", "unknown"], "'unknown'"),
        (["--peers", "unsloth"], "unsloth runs on a GPU only"),
        (["--repeats", "0"], "at least 1"),
        (["--quick", "--output", "rows.csv"], "no measurements"),
        (["--output", "other.csv"], "other.csv is not a file of benchmark rows"),
        (["--output", "other.csv/rows.csv"], "rows.csv cannot be written"),
    ],
)
def test_bad_input(arguments: list[str], says: str, tmp_path: Path, fourbit_here: Run) -> None:
    (tmp_path / "other.csv").write_text("a,b\n")
    assert says in fourbit_here("bench", *arguments).complaint


def test_a_shape_too_large_is_refused_before_anything_is_allocated(
    fourbit_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourbit.bench.environment.free_memory_bytes", lambda *, gpu: 20 * 10**9)
    monkeypatch.setattr("fourbit.bench.environment.accelerators", list)
    complaint = fourbit_here("bench", "--shape", "llama-65b").complaint
    # 64.8 B parameters at 4.127 bits, and 2 x 524 MB of embeddings and head
    assert (
        "The weights of llama-65b take 34.5 GB in 4 bits, and 20.0 GB are free here; take a smaller shape" in complaint
    )


def test_a_gpu_that_torch_cannot_use_is_named(fourbit_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourbit.bench.environment.accelerators", lambda: ["NVIDIA L4"])
    complaint = fourbit_here("bench", "--shape", "tiny").complaint
    assert "NVIDIA L4" in complaint
    assert "install the build for CUDA" in complaint or "cannot use it" in complaint


def test_a_shape_is_measured(fourbit_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourbit.bench.environment.accelerators", list)
    done = fourbit_here(
        "bench", "--shape", "tiny", "--layers", "1", "--what", "decode,memory", "--peers", "none", "--quick", "--json"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["notes"] == []
    assert {(row["case"], row["contender"]) for row in found["rows"]} >= {
        ("decode-tiny-1layers-1", "fourbit"),
        ("decode-tiny-1layers-1", "limit: read"),
        ("memory-tiny-1layers-1x16-r4", "fourbit"),
    }
    plan = json.loads(fourbit_here("bench", "--shape", "tiny", "--dry-run", "--peers", "none", "--json").out)["cases"]
    assert "step-tiny-fourbit" in plan
    assert plan["decode-tiny"] == ["tiny"]


def test_what_was_measured_is_shown_even_if_it_cannot_be_kept(
    tmp_path: Path, fourbit_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, **__: object) -> Measured:
        (tmp_path / "rows.csv").mkdir()  # meanwhile
        return Measured([], ["a note"])

    monkeypatch.setattr("fourbit.bench.run.measure", measure)
    done = fourbit_here("bench", "--what", "quantize", "--json", "--output", "rows.csv")
    assert done.code == 2
    assert json.loads(done.out)["notes"] == ["a note"]
    assert "rows.csv cannot be written" in done.err
