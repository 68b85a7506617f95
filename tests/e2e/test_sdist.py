"""The source distribution holds what `make check` needs, and no caches."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path


def test_contents(repository: Path, tmp_path: Path) -> None:
    sdist = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--formats", "tar", "--dist-dir", str(tmp_path)]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *sdist],
        cwd=repository, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.tar")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"Makefile", "CONTRIBUTING.md", "constraints-tools.txt", "setup.py"} <= names
    for folder in ("src", "csrc", "tests", "docs", "tools", "benchmarks"):
        sources = (
            file for kind in ("py", "cpp", "h", "md", "csv") for file in (repository / folder).rglob(f"*.{kind}")
        )
        assert {str(file.relative_to(repository)) for file in sources} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so", ".o"))]
