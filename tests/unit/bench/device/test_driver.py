"""Budgets, crashes and the order of things, with sections that are tiny programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fourbit.bench import rows
from fourbit.bench.device import driver, summary
from fourbit.bench.device.sections import Section
from fourbit.bench.device.settings import LOG, NOTES, ROWS, Settings
from fourbit.bench.rows import Row


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Section]:
    """Makes a section out of a line of Python."""
    (tmp_path / "program").mkdir()

    def make(name: str, line: str, **others: Any) -> Section:
        package = tmp_path / "program" / f"{name}.py"
        package.write_text(f"def run(settings, ledger):\n    {line}\n")
        return Section(name, "ops", f"{name}.run", **others)

    start = (
        f"import importlib, sys; sys.path.insert(0, {str(tmp_path / 'program')!r});"
        " from fourbit.bench.device import settings as s;"
        " home, function = sys.argv[1].split('.'); told = s.Settings.from_json(sys.argv[2]);"
        " getattr(importlib.import_module(home), function)(told, s.Ledger(told))"
    )
    real = driver.subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        return real([command[0], "-c", start, *command[3:]], **settings)

    monkeypatch.setattr(driver.subprocess, "run", run)
    return make


def test_a_section_that_fails_or_hangs_costs_only_itself(
    programs: Callable[..., Section], settings: Settings, tmp_path: Path
) -> None:
    told: list[str] = []
    outcomes = driver.run(
        [
            programs("fine", "ledger.note('first')"),
            programs("crashes", "import os; ledger.note('before the crash'); os.abort()"),
            programs("hangs", "import time; time.sleep(60)", budget_s=2),
            programs("raises", "raise RuntimeError('no memory left')"),
            programs("peerless", "ledger.note('never')", needs="a-peer"),
            programs("last", "ledger.note('last')"),
        ],
        settings,
        minutes=2,
        environment={},
        tell=told.append,
    )
    ends = {name: end for name, _, end in outcomes}
    assert ends["fine"] == ends["last"] == "done"
    assert ends["crashes"].startswith("exit code -6")
    assert ends["hangs"] == "ended after its 2 s"
    assert ends["raises"] == "exit code 1: RuntimeError: no memory left"
    assert "peerless" not in ends
    kept = (tmp_path / NOTES).read_text()
    assert kept.splitlines()[:3] == ["first", "before the crash", "last"]
    assert "The section hangs is not complete: ended after its 2 s." in kept
    assert "=== hangs" in (tmp_path / LOG).read_text()
    assert len(told) == 5


def test_when_time_is_up_nothing_more_is_begun(programs: Callable[..., Section], settings: Settings) -> None:
    outcomes = driver.run(
        [programs("late", "ledger.note('never')")], settings, minutes=0.05, environment={}, tell=print
    )
    assert outcomes == [("late", 0.0, "no time left")]


def test_results_of_a_run_before_are_replaced(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text("old")
    (tmp_path / NOTES).write_text("old\n")
    driver.run([], settings, minutes=1, environment={}, tell=print)
    assert not (tmp_path / ROWS).exists()
    assert summary.lines(tmp_path) == ["No bar was measured."]
    assert summary.notes(tmp_path) == []


def test_without_the_tests_folder_that_section_says_so(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [(_, _, end)] = driver.run([Section("tests", "tests", "")], settings, minutes=1, environment={}, tell=print)
    assert end == "there is no folder tests/gpu here"


def test_the_bars_are_printed_last(row: Callable[..., Row], settings: Settings, tmp_path: Path) -> None:
    case = {"case": "linear-11008x4096-1", "unit": "µs", "device": "a GPU"}
    rows.append(
        tmp_path / ROWS,
        [
            row("fourbit", 10, share=0.75, share_of="limit: read", **case),
            row("fourbit, fp32 scales", 9.9, **case),
            row("fourbit, variant wide", 9.0, **case),
            row("limit: read", 3000, **(case | {"unit": "GB/s"})),
        ],
    )
    told = summary.lines(tmp_path)
    assert len(told) == 3
    assert "fourbit: 0.99× as fast as fourbit, fp32 scales (asked: 0.97× or more): met" in told[0]
    assert "fourbit: 75% of read (asked: 70% or more): met" in told[1]
    assert "fourbit, variant wide is 1.11× as fast as the chosen way" in told[2]


def test_a_peak_is_held_against_a_number(row: Callable[..., Row], settings: Settings, tmp_path: Path) -> None:
    case = {"case": "memory-llama-7b-1x512-r64", "unit": "GB", "device": "a GPU"}
    rows.append(tmp_path / ROWS, [row("fourbit", 5.1, **case), row("fourbit, fp32 states", 6.2, **case)])
    first, second = summary.lines(tmp_path)
    assert "fourbit: 5.1 (asked: 5 or less): MISSED" in first
    assert "fourbit, fp32 states: 6.2 (asked: 6.3 or less): met" in second


def test_settings_reach_the_section(programs: Callable[..., Section], settings: Settings, tmp_path: Path) -> None:
    told = replace(settings, layers=3)
    driver.run(
        [programs("tells", "ledger.note(f'layers {settings.layers}, peers {settings.peers}')")],
        told,
        minutes=1,
        environment={},
        tell=print,
    )
    assert (tmp_path / NOTES).read_text() == "layers 3, peers ('bitsandbytes',)\n"


def test_contenders_of_different_processes_are_compared_in_the_end(row: Callable[..., Row], tmp_path: Path) -> None:
    case = {"case": "step-llama-7b-16x512-r64", "unit": "tokens/s", "device": "a GPU"}
    rows.append(tmp_path / ROWS, [row("fourbit", 9, check=10.5, **case)])
    rows.append(tmp_path / ROWS, [row("bitsandbytes + peft", 5, check=11.5, **case)])
    told = summary.lines(tmp_path)
    assert "fourbit: 1.80× as fast as bitsandbytes + peft (asked: 1.8× or more): met" in told[0]
    assert "bitsandbytes + peft and fourbit disagree" in told[1]
