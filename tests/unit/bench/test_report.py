"""Rows beside the bars, and the page that is made of them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from fourbit.bench import registry, report, rows
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


def test_the_tables_of_the_page(row: Make) -> None:
    found = {"quantize-nf4": [row("fourbit", 5000), row("bitsandbytes", 50)]}
    cases = [one for _, one in registry.all_cases()]
    page = report.tables(cases, found)
    assert "## quantize to NF4: bf16 weights 4096 × 4096" in page
    assert "| bitsandbytes | 50 | 25–100 | 100× |  | 200 |" in page
    assert "as fast as bitsandbytes (asked: 50× or more): met" in page
    assert "2026-01-02: a processor, 2 cores, 24 GB, Linux 6, our kernels at avx2; fourbit 0.1 at abc1234567" in page
    assert "Others took 1%" in page
    assert "load and quantize" not in page
    assert "no rows yet" in report.tables(cases, {})


def test_a_gpu_and_its_memory_are_named(row: Make) -> None:
    on_gpu = {"device": "NVIDIA H100", "peak_device_bytes": 5 * 10**9, "libraries": "triton 3.6.0", "level": ""}
    found = {"quantize-nf4": [row("fourbit", 5000, **on_gpu)]}
    page = report.tables([case("quantize", "quantize-nf4")], found)
    assert "| fourbit | 5,000 | 2,500–10,000 |  |  | 5,000 |" in page
    assert "NVIDIA H100, a processor" in page
    assert "with triton 3.6.0" in page


def test_numbers() -> None:
    shown = [report.number(value) for value in (0, 0.00012, 0.0123, 1, 99.94, 123.4, 5191.4)]
    assert shown == ["0", "1.20e-04", "0.0123", "1", "99.9", "123", "5,191"]


@pytest.fixture
def write_docs(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, writing into an empty folder, from rows there."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    for name in ("write_docs", "plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("write_docs")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PAGE", tmp_path / "benchmarks.md")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def rows_of_two_machines(row: Make) -> list[Row]:
    gpu = {"device": "NVIDIA H100 80GB", "peak_device_bytes": 5 * 10**9}
    return [
        row("fourbit", 5000),
        row("bitsandbytes", 50),
        *(row(name, 2.0, case=f"linear-{m}", unit="ms") for m in (1, 4) for name in ("fourbit", "bitsandbytes")),
        *(row(name, 900, case=case, unit="tokens/s") for case in ("step", "step-checkpointing")
          for name in ("fourbit", "bitsandbytes, lean")),
        row("fourbit", 60, case="decode-llama-7b-1", unit="tokens/s", share=0.5, share_of="limit: read", **gpu),
        row("fourbit", 5.1, case="memory-llama-7b-1x512-r64", unit="GB", **gpu),
    ]  # fmt: skip


def test_the_page_and_its_pictures(write_docs: ModuleType, row: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows.append(tmp_path / "bench.csv", rows_of_two_machines(row))
    assert write_docs.main([]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert (
        page.index("## quantize to NF4")
        < page.index("# On NVIDIA H100 80GB")
        < page.index("## greedy decode, llama-7b")
    )
    assert "fourbit: 5.1 (asked: 5 or less): MISSED" in page
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert shown == [
        "benchmarks-speed.png",
        "benchmarks-tokens.png",
        "benchmarks-step.png",
        "benchmarks-nvidia-h100-80gb-decode.png",
        "benchmarks-nvidia-h100-80gb-memory.png",
    ]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert write_docs.main(["--check"]) == 0


def test_drift_is_noticed(write_docs: ModuleType, row: Make, tmp_path: Path) -> None:
    assert write_docs.main(["--check"]) == 1
    (tmp_path / "benchmarks.md").write_text(write_docs.rendered())
    assert write_docs.main(["--check"]) == 0
    rows.append(tmp_path / "bench.csv", [row("fourbit", 5000)])
    assert write_docs.main(["--check"]) == 1
