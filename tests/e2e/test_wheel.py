"""The wheel holds what an installed fourbit needs, and fits every Python."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fourbit
from fourbit.kernels import native


@pytest.mark.skipif(native.unavailable() is not None, reason=f"the native kernels are {native.unavailable()}")
def test_contents(repository: Path, tmp_path: Path) -> None:
    build = ["build", "--build-lib", str(tmp_path / "lib")]
    wheel = ["bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "wheel")]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *build, *wheel],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    (path,) = tmp_path.glob("*.whl")
    assert path.name.startswith(f"fourbit-{fourbit.__version__}-py3-none-")
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
        (entry_points,) = [file.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert {"fourbit/py.typed", "fourbit/kernels/native/libfourbit.so", "fourbit/kernels/native/build.txt"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert entry_points == "[console_scripts]\nfourbit = fourbit.cli:main\n"
    files = [file for file in (repository / "src/fourbit").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    sources = {str(file.relative_to(repository / "src")) for file in files}
    assert {"fourbit/pages/base.css", "fourbit/serve/pages/rate.js", "fourbit/train/report.html.j2"} <= sources
    assert {name for name in names if name.startswith("fourbit/")} == sources
