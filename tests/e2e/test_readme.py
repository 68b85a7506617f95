"""Every command and every program in the README and the tour runs, in its order."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
INSTALLS = {"pip install '.[train]'"}
"""Not run here, as the suite runs inside the result; `make wheel` is the same build."""


def blocks(page: str = "README.md") -> list[tuple[str, str]]:
    """The fenced blocks: language, text."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, stories_model: Path, shared_data: Path) -> Path:
    """A folder with what the README speaks of."""
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/model").symlink_to(stories_model)
    (tmp_path / "path/to/models").mkdir()
    (tmp_path / "path/to/models/stories").symlink_to(stories_model)
    stories = (shared_data / "tinystories/tinystories_sample.2MiB.txt").read_text(encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(stories[:4000], encoding="utf-8")
    rows = [{"prompt": f"Who is number {n}?", "completion": f"Number {n} is Lily."} for n in range(8)]
    (tmp_path / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    votes = "".join(f"{n},a,b,{'a' if n % 4 else 'tie'}\n" for n in range(40))
    (tmp_path / "votes.csv").write_text("question_id,model_a,model_b,winner\n" + votes)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "Who is number 9?"}\n')
    return tmp_path


def write_ratings(folder: Path) -> None:
    """What the judge would have written, had it been asked for more than its price."""
    rows = [{"id": n, "first": "ab"[n % 2], "second": "ba"[n % 2], "label": 1 + n % 3, "judge": "j"} for n in range(40)]
    (folder / "ratings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(arguments: list[str], folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"


def test_the_readme_in_its_order(folder: Path) -> None:
    assert {language for language, _ in blocks()} == {"sh", "python"}
    for language, text in blocks():
        if language == "python":
            run([sys.executable, "-c", text], folder)
            continue
        for line in text.splitlines():
            if line.startswith("make "):
                run(["make", "--dry-run", "--directory", str(ROOT), *line.split()[1:]], folder)
            elif line not in INSTALLS:
                run(["bash", "-c", line], folder)
                if line.startswith("fourbit judge "):
                    write_ratings(folder)
    assert {"model-nf4", "adapter", "my-adapter", "answers.jsonl", "ranking.png"} <= {
        path.name for path in folder.iterdir()
    }


def test_the_tour_counts_right(tmp_path: Path) -> None:
    ((language, text),) = blocks("docs/tour.md")
    assert language == "python"
    run([sys.executable, "-c", text], tmp_path)


def test_ci_runs_the_command_of_the_readme() -> None:
    commands = [line for language, text in blocks() if language == "sh" for line in text.splitlines()]
    demo, test_command = [line for line in commands if line.startswith("make ")]
    assert demo == "make demo"
    assert re.search(rf"^{test_command} ", (ROOT / ".ci/run").read_text(encoding="utf-8"), flags=re.MULTILINE)
