"""Writes docs/benchmarks.md out of benchmarks/results/*.csv: `python benchmarks/write_docs.py [--check]`.

With `--check` nothing is written, and the exit code is 1 where the page is not what the rows say.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fourbit.bench import registry, report, rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"


def rendered() -> str:
    """The page as the committed rows have it."""
    found = [row for path in sorted(RESULTS.glob("bench*.csv")) for row in rows.read(path)]
    return report.page(registry.all_cases(), rows.latest(found))


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit code."""
    text = rendered()
    if arguments == ["--check"]:
        if not PAGE.exists() or PAGE.read_text() != text:
            print(f"{PAGE.relative_to(ROOT)} is not what the rows say; run `python benchmarks/write_docs.py`.")
            return 1
        return 0
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
