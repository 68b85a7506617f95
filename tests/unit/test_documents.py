"""The documents tell the truth where a machine can check it. Their commands are run in tests/e2e/test_readme.py."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text(encoding="utf-8"))]
    broken = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert broken == []


def test_decisions_are_numbered_without_gaps_and_say_what_they_cost() -> None:
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in decisions] == [f"{number:04d}" for number in range(1, len(decisions) + 1)]
    for page in decisions:
        headings = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert headings == ["Context", "Choice", "Cost"], page.name


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in PAGES:
        asked = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert asked <= targets, page.name


def test_extras_that_are_told_of_exist() -> None:
    told = {
        extra.strip(): str(path.relative_to(ROOT))
        for path in [*PAGES, *(ROOT / "src").rglob("*.py")]
        for extras in re.findall(r"(?:fourbit|'\.)\[([a-z, ]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "train" in told
    assert {extra: place for extra, place in told.items() if extra not in project["optional-dependencies"]} == {}


@pytest.mark.parametrize(
    "script", ["write_docs.py", "perplexity_formats.py", "published_ratings.py", "mmlu_harness.py"]
)
def test_measured_pages_are_what_the_numbers_say(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runpy.run_path(str(ROOT / "benchmarks" / script))["main"](["--check"]) == 0, capsys.readouterr().out
