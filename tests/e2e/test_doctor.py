"""`fourbit doctor` on this machine, and on one without the native library."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fourbit

Run = Callable[..., Any]


def test_json(fourbit_command: Run) -> None:
    done = fourbit_command("doctor", "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    found = json.loads(done.out)
    assert found["problems"] == []
    assert found["versions"]["fourbit"] == fourbit.__version__
    assert found["versions"]["torch"].startswith("2.")
    assert found["devices"][0]["type"] == "cpu"
    assert found["devices"][0]["cores"] >= 1
    assert found["devices"][0]["memory_bytes"] > 2**30
    assert found["hooks"] == {"peft": "in place"}
    assert set(found["backends"]) >= {"quantize_blocks", "dequantize_blocks"}
    for operation in found["backends"].values():
        assert operation["backend"] in ("native", "triton", "reference")
        assert operation["why"]


def test_table(fourbit_command: Run) -> None:
    done = fourbit_command("doctor", COLUMNS="80")
    assert done.code == 0, done.err
    assert all(title in done.out for title in ("Versions", "Devices", "Operations", "Native library", "Extras"))
    assert max(map(len, done.out.splitlines())) <= 80


def test_it_says_what_keeps_a_gpu_from_being_used(fourbit_command: Run) -> None:
    """Or that nothing does: one sentence, for a person with a GPU and a torch that does not see it, too."""
    found = json.loads(fourbit_command("doctor", "--json", TRITON_INTERPRET="0").out)["triton"]
    if torch.cuda.is_available():
        assert found["available"] or found["why"]
    else:
        assert found["why"] == "torch sees no GPU" or "install a CUDA build of torch" in found["why"]


def test_it_says_why_the_reference_runs(fourbit_command: Run) -> None:
    found = json.loads(fourbit_command("doctor", "--json", FOURBIT_BACKEND="reference").out)
    assert {entry["backend"] for entry in found["backends"].values()} == {"reference"}
    assert {entry["why"] for entry in found["backends"].values()} == {"asked for"}


@pytest.mark.parametrize("name", ["FOURBIT_CPU", "FOURBIT_BACKEND"])
def test_a_wrong_setting_is_named(name: str, fourbit_command: Run) -> None:
    done = fourbit_command("doctor", **{name: "abacus"})
    assert done.code == 2
    assert "abacus" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_gpu_that_torch_does_not_use_is_told(fourbit_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourbit.bench.environment.accelerators", lambda: ["NVIDIA L4"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.__version__", torch.torch_version.TorchVersion("2.11.0+cpu"))
    done = fourbit_here("doctor", "--json")
    assert done.code == 0  # the CPU works
    [sentence] = json.loads(done.out)["advice"]
    assert sentence.startswith("There is a GPU (NVIDIA L4), but torch 2.11.0+cpu is built for CPUs; install")
    assert "NVIDIA L4" in fourbit_here("doctor").out
