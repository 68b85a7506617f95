"""The cases: complete, consistent, and cheap to list."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fourbit.bench import registry
from fourbit.bench.case import LIMIT, OURS, Bar, Measure
from fourbit.errors import InputError


@pytest.mark.parametrize("quick", [False, True])
def test_every_case_is_consistent(quick: bool) -> None:
    cases = [case for _, case in registry.all_cases(quick=quick)]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [contender.name for contender in case.contenders]
        assert len(set(names)) == len(names)
        assert names[0].startswith((OURS, LIMIT))
        for contender in case.contenders:
            assert (contender.needs is None) == contender.name.startswith(
                (OURS, LIMIT, "torch,", "peft", "transformers")
            )
            assert contender.share is None or contender.share.limit in names
        for bar in case.bars:
            assert bar.kind in ("speed", "memory", "share")
            assert {bar.ours, bar.against} <= set(names)
            assert bar.kind != "share" or case.contender(bar.ours).share is not None


def test_quick_cases_are_the_same_things_in_small() -> None:
    full = {case.name: case for _, case in registry.all_cases()}
    for _, case in registry.all_cases(quick=True):
        assert [one.name for one in case.contenders] == [one.name for one in full[case.name].contenders]
        assert (case.repeats, case.rounds, case.sample_s) == (1, 1, 0)
        assert case.bars == full[case.name].bars


def test_the_bars_are_the_ones_that_were_set() -> None:
    """DESIGN's table of ratios, for what is built so far."""
    bars = {case.name: {(bar.kind, bar.against): bar.bound for bar in case.bars} for _, case in registry.all_cases()}
    assert bars["quantize-nf4"] == {("speed", "bitsandbytes"): 50}
    assert bars["dequantize-nf4"] == {("speed", "bitsandbytes"): 8, ("share", "limit: copy"): 0.85}
    assert bars["linear-1"][("speed", "bitsandbytes, kernel")] == 1.5
    assert bars["linear-1"][("share", "limit: read")] == 0.75
    assert bars["load"] == {("speed", "bitsandbytes"): 5, ("memory", "bitsandbytes"): 0.5}
    assert bars["step"][("speed", "bitsandbytes, documented")] == 2
    assert bars["adamw"][("speed", "torch, fused")] == bars["adamw-many"][("speed", "torch, fused")] == 0.9
    assert bars["step"][("speed", "bitsandbytes, lean")] == 1.25
    assert bars["step"][("speed", "fourbit, 16-bit LoRA")] == 0.95
    assert bars["step"][("memory", "bitsandbytes, lean")] == 1
    assert bars["step-checkpointing"][("speed", "bitsandbytes, documented")] == 1.6


def test_words_choose_cases() -> None:
    def names(*words: str) -> list[str]:
        return [case.name for _, case in registry.all_cases(words)]

    assert names("linear-1", "quantize") == ["quantize-nf4", "linear-1"]
    assert names("step") == ["step", "step-checkpointing"]
    assert set(names("ops")) > set(names("dequantize")) > set()
    assert names("decode") == ["decode-1", "decode-1-lora", "decode-8", "decode-8-lora"]
    assert names("optimizer") == ["adamw", "adamw-many", "adamw-8bit"]
    assert names("machine", "ops", "load", "step", "optimizer", "decode") == [
        case.name for _, case in registry.all_cases()
    ]
    with pytest.raises(InputError, match="nothing called 'speed' to measure; choose from machine, ops"):
        names("speed")


def test_listing_imports_no_torch() -> None:
    """The process that compares stays small, and `fourbit bench --help` fast."""
    program = (
        "import sys; from fourbit.bench import registry, run, report; registry.all_cases();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_measures_and_bars() -> None:
    assert Measure("tokens/s", 1024).of(2.0) == 512
    assert Measure("ms", 1e3, is_rate=False).of(0.5) == 500
    assert Bar("speed", "x", 2.0).met(2.0)
    assert not Bar("speed", "x", 2.0).met(1.99)
    assert Bar("memory", "x", 0.5).met(0.5)
    assert not Bar("memory", "x", 0.5).met(0.51)
