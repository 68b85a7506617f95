"""Checkpoints that are either whole or not there.

One is written into a folder whose name nobody looks for, with the size and hash of each file in a manifest, brought to
the disk, and only then given its name. A run that was killed at any moment leaves whole checkpoints and perhaps a
remainder, which the next one sweeps away.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fourbit.models.folders import sync

__all__ = [
    "find_newest",
    "forget_old",
    "is_complete",
    "list_checkpoints",
    "replace_file",
    "step_of",
    "sweep",
    "writing",
]

MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".unfinished"


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `folder` when the block ends well and vanishes otherwise."""
    unfinished = folder.with_name(f".{folder.name}{_UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(unfinished)): _describe(path) for path in files}
        (unfinished / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*files, unfinished / MANIFEST_FILE, unfinished):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, from before the run was taken up again
        unfinished.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def find_newest(output: Path) -> Path | None:
    """The complete checkpoint of the latest step; None if there is none."""
    return next((path for path in reversed(list_checkpoints(output)) if is_complete(path)), None)


def list_checkpoints(output: Path) -> list[Path]:
    """All checkpoints in a folder, whole or not, by their steps."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def is_complete(checkpoint: Path) -> bool:
    """Whether every file is there and has the size and hash that the manifest names."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        return bool(manifest) and all(
            (checkpoint / name).stat().st_size == expected["size_bytes"] and _describe(checkpoint / name) == expected
            for name, expected in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def forget_old(output: Path, *, keep: int | None, best: str | None) -> None:
    """Delete all but the newest `keep` checkpoints, and the one that the trainer calls the best."""
    if keep is None:
        return
    for path in list_checkpoints(output)[:-keep]:
        if best is None or path.name != Path(best).name:
            shutil.rmtree(path, ignore_errors=True)


def sweep(output: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in output.glob(f".*{_UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that there is either the old or the new one at any moment."""
    unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def _describe(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}
