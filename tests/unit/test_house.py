"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fourbit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "fourbit"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")
FOLDERS = ("src", "csrc", "tests", "tools", "benchmarks", "docs", ".ci")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sources() -> Iterator[Path]:
    """Every text file that belongs to the repository."""
    kinds = {".py", ".cpp", ".h", ".def", ".md", ".toml", ".txt", ".json", ".jsonl", ".csv", ".yaml", ""}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            built = "__pycache__" in path.parts or "fourbit.egg-info" in path.parts or path.name == "build.txt"
            if path.is_file() and path.suffix in kinds and not built:
                yield path
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in kinds)


def exported(tree: ast.Module) -> list[str] | None:
    """The names in `__all__`; None if the module has none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [str(name) for name in ast.literal_eval(node.value)]
    return None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_all_names_what_a_module_gives(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = exported(tree)
    own = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    public = {name for name in own if not name.startswith("_")}
    if names is None:
        assert not public, f"{name_of(path)} defines {sorted(public)} and has no __all__"
    else:
        assert public <= set(names), f"missing from __all__ of {name_of(path)}: {sorted(public - set(names))}"
        assert not [name for name in names if name.startswith("_") and name != "__version__"]


def test_every_public_name_is_there() -> None:
    assert len(set(fourbit.__all__)) == len(fourbit.__all__)
    assert [name for name in fourbit.__all__ if not hasattr(fourbit, name)] == []
    with pytest.raises(AttributeError, match="no_such_name"):
        fourbit.no_such_name  # noqa: B018


def test_no_drawer_for_odds_and_ends() -> None:
    words = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}
    offenders = [name_of(path) for path in sources() if words & set(path.stem.lower().split("_"))]
    assert offenders == []


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    release = fourbit.__version__.partition(".dev")[0]
    assert f"## [{release}]" in changelog


@pytest.mark.parametrize("stem", sorted(path.stem for path in (PACKAGE / "kernels/ops").glob("[!_]*.py")))
def test_one_stem_names_an_operation_everywhere(stem: str) -> None:
    assert (PACKAGE / "kernels/reference" / f"{stem}.py").exists()
    assert (ROOT / "tests/unit/kernels" / f"test_{stem}.py").exists()


def test_no_path_of_one_machine() -> None:
    roots = ["/" + folder + "/" for folder in ("work", "root", "home", "Users")]
    offenders = [
        f"{name_of(path)}: {root}"
        for path in sources()
        for root in roots
        if root in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert offenders == []
