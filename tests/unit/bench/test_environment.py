"""What a row says of the machine."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from typing import Any

import pytest

import fourbit
from fourbit.bench import environment
from fourbit.errors import InputError


def test_the_machine() -> None:
    assert environment.cpu_name()
    assert environment.cores() >= 1
    assert environment.memory_bytes() > 2**30
    assert 2**20 <= environment.last_level_cache_bytes() < 2**32


def test_versions() -> None:
    found = environment.versions()
    assert found["fourbit"] == fourbit.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"].startswith("2.")


def test_commit() -> None:
    assert re.fullmatch(r"([0-9a-f]{10,}\+?)?", environment.commit())


def answers(monkeypatch: pytest.MonkeyPatch, *, torch: tuple[str, Any, list[int]], driver: list[str]) -> None:
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(torch), stderr="")
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(environment, "accelerators", lambda: driver)


def test_the_gpu_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, torch=("2.11.0+cu130", "NVIDIA T4", [7, 5]), driver=["NVIDIA T4"])
    assert environment.usable_accelerator() == "NVIDIA T4"


@pytest.mark.parametrize(
    ("torch", "driver", "says"),
    [
        (
            ("2.11.0+cpu", False, []),
            ["NVIDIA L4"],
            r"a GPU \(NVIDIA L4\), but torch 2\.11\.0\+cpu is built for CPUs; install",
        ),
        (("2.11.0+cu130", False, []), ["NVIDIA L4"], "cannot use it: its driver is too old"),
        (("2.11.0+cpu", False, []), [], "There is no GPU here; --interpret"),
        (
            ("2.11.0+cu130", "Quadro P4000", [6, 1]),
            ["Quadro P4000"],
            r"compute capability 6\.1, and Triton compiles for 7\.5",
        ),
    ],
)
def test_a_gpu_that_cannot_be_measured_is_explained(
    torch: Any, driver: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, torch=torch, driver=driver)
    with pytest.raises(InputError, match=says):
        environment.usable_accelerator()


def test_the_driver_is_asked_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> Any:
        text = "NVIDIA H100\n" if "name" in command[1] else "79000 MiB\n"
        return subprocess.CompletedProcess(command, 0, stdout=text, stderr="")

    monkeypatch.setattr(environment.subprocess, "run", run)
    assert environment.accelerators() == ["NVIDIA H100"]
    assert environment.free_memory_bytes(gpu=True) == 79000 << 20
    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    assert environment.accelerators() == []
    assert environment.free_memory_bytes(gpu=True) is None
    assert (environment.free_memory_bytes(gpu=False) or 2**31) > 2**20


def test_peers_that_run_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: object())
    assert environment.installed_peers(gpu=True) == ["bitsandbytes", "torchao", "unsloth"]
    assert environment.installed_peers(gpu=False) == ["bitsandbytes", "torchao", "llama_cpp"]
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    assert environment.installed_peers(gpu=True) == []


def test_our_own_work_is_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 40.0, 10.0), (110.0, 48.0, 15.0)])
    monkeypatch.setattr(environment.Disturbance, "_readings", staticmethod(lambda: next(readings)))
    assert environment.Disturbance().share() == pytest.approx(0.3)


def test_a_disturbance_is_a_part() -> None:
    disturbance = environment.Disturbance()
    time.sleep(0.1)
    share = disturbance.share()
    assert share is None or 0 <= share <= 1
