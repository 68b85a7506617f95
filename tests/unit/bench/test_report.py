"""Rows beside the bars, and the page that is made of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fourbit.bench import registry, report
from fourbit.bench.rows import Row

Make = Callable[..., Row]


def case(module: str, name: str) -> registry.Case:
    return registry.find(module, name, quick=False)


def test_a_rate_is_better_when_higher_and_a_time_when_lower(row: Make) -> None:
    quantize, load = case("quantize", "quantize-nf4"), case("load", "load")
    [fast] = report.standings(quantize, [row("fourbit", 5000), row("bitsandbytes", 50)])
    assert (fast.value, fast.met) == (100, True)
    assert "100.00× as fast as bitsandbytes (asked: 50× or more): met" in fast.sentence()
    speed, memory = report.standings(
        load, [row("fourbit", 4, peak_rss_bytes=3 * 10**8), row("bitsandbytes", 16, peak_rss_bytes=5 * 10**8)]
    )
    assert (speed.value, speed.met) == (4, False)
    assert "MISSED" in speed.sentence()
    assert (memory.value, memory.met) == (0.6, False)


def test_a_share_is_held_against_its_limit(row: Make) -> None:
    dequantize = case("dequantize", "dequantize-nf4")
    limit = row("limit: copy", 40, unit="GB/s")
    [share] = report.standings(dequantize, [row("fourbit", 30, share=0.9, share_of="limit: copy"), limit])
    assert (share.bar.kind, share.value, share.met) == ("share", 0.9, True)
    assert "90% of copy" in share.sentence()


def test_without_the_peer_there_is_no_bar(row: Make) -> None:
    assert report.standings(case("quantize", "quantize-nf4"), [row("fourbit", 5000)]) == []


def test_lines(row: Make) -> None:
    quantize = case("quantize", "quantize-nf4")
    rows = [
        row("fourbit", 5191.4, share=0.314, share_of="limit: copy"),
        row("bitsandbytes", 31.8),
        row("limit: copy", 42.3, unit="GB/s"),
    ]
    assert report.lines(quantize, rows) == [
        ("fourbit", "5,191", "2,596–10,383", "", "31%", "200"),
        ("bitsandbytes", "31.8", "15.9–63.6", "163×", "", "200"),
        ("limit: copy", "42.3 GB/s", "21.1–84.6", "", "", ""),
    ]
    assert len(report.header(quantize)) == 6


def test_the_page(row: Make) -> None:
    found = {"quantize-nf4": [row("fourbit", 5000), row("bitsandbytes", 50)]}
    page = report.page(registry.all_cases(), found)
    assert "## quantize to NF4: bf16 weights 4096 × 4096" in page
    assert "| bitsandbytes | 50 | 25–100 | 100× |  | 200 |" in page
    assert "as fast as bitsandbytes (asked: 50× or more): met" in page
    assert "2026-01-02: a processor, 2 cores, 24 GB, Linux 6, our kernels at avx2; fourbit 0.1 at abc1234567" in page
    assert "Others took 1%" in page
    assert "load and quantize" not in page
    assert "no rows yet" in report.page(registry.all_cases(), {})


def test_numbers() -> None:
    shown = [report.number(value) for value in (0, 0.00012, 0.0123, 1, 99.94, 123.4, 5191.4)]
    assert shown == ["0", "1.20e-04", "0.0123", "1", "99.9", "123", "5,191"]


@pytest.fixture
def write_docs(repository: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location("write_docs", repository / "benchmarks" / "write_docs.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_drift_is_noticed(write_docs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(write_docs, "ROOT", tmp_path)
    monkeypatch.setattr(write_docs, "PAGE", tmp_path / "benchmarks.md")
    assert write_docs.main(["--check"]) == 1
    assert write_docs.main([]) == 0
    assert write_docs.main(["--check"]) == 0
    (tmp_path / "benchmarks.md").write_text("faster!\n")
    assert write_docs.main(["--check"]) == 1
