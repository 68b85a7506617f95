"""`benchmarks/gpu.py` as it is called on a borrowed machine, in miniature on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit.bench import rows


def run(repository: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, repository / "benchmarks" / "gpu.py", *arguments],
        cwd=cwd,
        env=os.environ | {"OUT": str(cwd / "out"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=500,
        check=False,
    )


def test_it_measures_and_prints_a_short_table_last(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "--interpret", "--peers", "none", "--sections", "machine,checks,decode", cwd=tmp_path)
    log = tmp_path / "out" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    assert "torch 2." in done.stdout.splitlines()[0]
    assert "0 wrong" in log.read_text()
    assert "its numbers mean nothing" in done.stdout.splitlines()[-1]
    found = {row.case for row in rows.read(tmp_path / "out" / "bench-device.csv")}
    assert found == {"device-machine", "decode-tiny-1", "decode-tiny-2"}
    # What comes back from a borrowed machine: few files, all in one folder.
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {
        "bench-device.csv", "checks.json", "log.txt", "notes.txt",
    }  # fmt: skip


@pytest.mark.slow
def test_all_of_it(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "--interpret", "--minutes", "8", cwd=tmp_path)
    log = (tmp_path / "out" / "log.txt").read_text()
    unfinished = [line for line in done.stdout.splitlines() if "is not complete" in line and "tests" not in line]
    assert unfinished == [], log
    assert "WRONG" not in done.stdout
    assert "left out" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--interpret", "--sections", "speed"], 2, "no section called 'speed'; choose from machine"),
        (["--interpret", "--shape", "lama-7b"], 2, "Did you mean llama-7b?"),
        (["--wheels", "nowhere"], 1, "There is no wheel in nowhere"),
        (["--minutes", "soon"], 2, "invalid float value"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], code: int, says: str, repository: Path, tmp_path: Path
) -> None:
    done = run(repository, *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
