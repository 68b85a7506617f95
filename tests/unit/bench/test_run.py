"""Turns, rounds and failures, with processes that only pretend; one real process at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fourbit.bench import registry, run
from fourbit.bench.case import Case, Contender, Measure, Share, Task
from fourbit.bench.process import ContenderFailed, started
from fourbit.bench.run import measure
from fourbit.errors import InputError

SECONDS = {"fourbit": 0.5, "bitsandbytes": 2.0, "limit: copy": 0.25}


class Stage:
    """Stands in for `process.started`, and remembers who was asked what."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.environments: dict[str, Mapping[str, str]] = {}
        self.fails: dict[str, int] = {}
        self.check = dict.fromkeys(SECONDS, 1.0)
        self.open = 0

    @contextmanager
    def started(self, arguments: list[str], environment: Mapping[str, str]) -> Iterator[Any]:
        name = arguments[2]
        self.environments[name] = environment
        self.open += 1
        try:
            yield Actor(self, name)
        finally:
            self.open -= 1


class Actor:
    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.name, self.failed, self.samples = stage, name, False, 0

    def answer(self) -> dict[str, Any]:
        self.stage.asked.append(f"start {self.name}")
        self._maybe_fail(0)
        return {"level": "avx2" if self.name == "fourbit" else "", "ready_rss_bytes": 100}

    def ask(self, word: str) -> dict[str, Any]:
        self.stage.asked.append(self.name if word == "sample" else f"end {self.name}")
        if word == "end":
            return {"peak_rss_bytes": 1000 * self.stage.open}
        self.samples += 1
        self._maybe_fail(self.samples)
        return {"seconds": SECONDS[self.name] * self.samples, "check": self.stage.check[self.name]}

    def wait(self) -> None:
        self.stage.asked.append("fixture")

    def _maybe_fail(self, moment: int) -> None:
        if self.stage.fails.get(self.name) == moment:
            self.failed = True
            raise ContenderFailed("out of luck")


def no_setup(folder: Path) -> Task:
    raise AssertionError(folder)


CASE = Case(
    name="made-up",
    title="",
    measure=Measure("things/s", 8),
    contenders=(
        Contender("fourbit", no_setup, share=Share("limit: copy", 12)),
        Contender("bitsandbytes", no_setup, needs="bitsandbytes", environment={"A": "b"}),
        Contender("limit: copy", no_setup, measure=Measure("GB/s", 20)),
    ),
    repeats=2,
    warmup=1,
)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(run, "started", stage.started)
    monkeypatch.setattr(run, "PAUSE_S", 0)
    monkeypatch.setattr(run, "find_spec", lambda name: object())
    monkeypatch.setattr(run, "QUIET", 2)
    return stage


def go(case: Case = CASE, **settings: Any) -> run.Run:
    return measure([("nowhere", case)], **{"peers": ["bitsandbytes"], **settings})


def test_contenders_take_turns(stage: Stage) -> None:
    found = go()
    turn = ["fourbit", "bitsandbytes", "limit: copy"]
    assert stage.asked == [f"start {name}" for name in turn] + turn * 3 + [f"end {name}" for name in turn]
    assert stage.environments["bitsandbytes"] == {"A": "b"}
    assert found.notes == []
    ours, theirs, limit = found.rows
    # The first sample, 0.5 s, was for warming up; 8 things in 1 and in 1.5 s are kept.
    assert (ours.median, ours.minimum, ours.maximum) == pytest.approx(((8 + 16 / 3) / 2, 16 / 3, 8))
    assert (ours.samples, ours.rounds, ours.unit, ours.level) == (2, 1, "things/s", "avx2")
    assert (ours.ready_rss_bytes, ours.peak_rss_bytes) == (100, 3000)
    assert theirs.median == pytest.approx((2 + 4 / 3) / 2)
    assert limit.unit == "GB/s"
    # 12 in a median of 1.25 s, of a limit of 20 in a median of 0.625 s
    assert ours.share == pytest.approx(12 / 1.25 / (20 / 0.625))
    assert (ours.share_of, theirs.share) == ("limit: copy", None)


def test_apart_each_process_has_the_machine_for_itself(stage: Stage) -> None:
    found = go(replace(CASE, together=False, rounds=2, warmup=0, repeats=1, fixture=lambda _: None))
    one_round = [
        line for name in ("fourbit", "bitsandbytes", "limit: copy") for line in (f"start {name}", name, f"end {name}")
    ]
    assert stage.asked == ["fixture", *one_round, *one_round]
    assert [row.peak_rss_bytes for row in found.rows] == [1000, 1000, 1000]
    assert [row.samples for row in found.rows] == [2, 2, 2]


def test_repeats_may_be_given(stage: Stage) -> None:
    assert [row.samples for row in go(repeats=5).rows] == [5, 5, 5]
    with pytest.raises(InputError, match="repeats is 0"):
        go(repeats=0)


def test_peers_that_were_not_asked_for_are_not_started(stage: Stage) -> None:
    assert [row.contender for row in go(peers=[]).rows] == ["fourbit", "limit: copy"]
    assert "start bitsandbytes" not in stage.asked


def test_an_absent_peer_is_one_sentence(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    found = measure([("nowhere", CASE), ("nowhere", replace(CASE, name="other"))], peers=["bitsandbytes"])
    assert len(found.notes) == 1
    assert "bitsandbytes is not installed" in found.notes[0]
    assert {row.contender for row in found.rows} == {"fourbit", "limit: copy"}


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_peer_that_fails_is_left_out(moment: int, stage: Stage) -> None:
    stage.fails["bitsandbytes"] = moment
    found = go(replace(CASE, rounds=2))
    assert found.notes == ["bitsandbytes failed in made-up and is left out: out of luck"]
    assert {row.contender: row.samples for row in found.rows} == {"fourbit": 4, "limit: copy": 4}


@pytest.mark.parametrize("name", ["fourbit", "limit: copy"])
def test_ours_must_not_fail(name: str, stage: Stage) -> None:
    stage.fails[name] = 1
    with pytest.raises(RuntimeError, match=f"{name} failed in made-up: out of luck"):
        go()
    assert stage.open == 0


def test_results_that_differ_are_reported(stage: Stage) -> None:
    stage.check["bitsandbytes"], stage.check["limit: copy"] = 1.03, 77.0
    assert go().notes == ["bitsandbytes and fourbit disagree in made-up: 1.03 and 1 came out."]
    stage.check["bitsandbytes"] = 1.01
    assert go().notes == []


def test_a_busy_machine_is_reported(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "QUIET", 0.05)
    monkeypatch.setattr(run.environment.Disturbance, "share", lambda self: 0.06)
    assert [note for note in go().notes if "do not trust" in note]
    assert go(quick=True).notes == []


def test_progress(stage: Stage) -> None:
    seen: list[tuple[str, int, int]] = []
    go(progress=lambda *what: seen.append(what))
    assert seen[-1] == ("made-up", 6, 6)


def test_a_real_process() -> None:
    found = measure(registry.all_cases(["machine"], quick=True), peers=[], quick=True)
    assert len(found.rows) == 6
    assert all(row.median > 0 and row.peak_rss_bytes >= row.ready_rss_bytes > 10**7 for row in found.rows)


def test_a_real_process_that_fails_says_why() -> None:
    with started(["machine", "machine", "no such contender", "quick", "."], {}) as process:
        with pytest.raises(ContenderFailed, match="StopIteration"):
            process.answer()
        with pytest.raises(ContenderFailed):
            process.ask("sample")
