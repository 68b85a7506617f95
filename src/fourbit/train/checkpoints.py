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

from fourbit.files import UNFINISHED, sync
from fourbit.models.folders import disk_problem

__all__ = [
    "find_fault",
    "find_newest",
    "forget_old",
    "list_checkpoints",
    "step_of",
    "sweep",
    "writing",
]

MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `folder` when the block ends well and vanishes otherwise.

    Raises:
        OSError: the disk takes no more, whichever library found out.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(unfinished)): _describe(path) for path in files}
        (unfinished / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*files, unfinished / MANIFEST_FILE, unfinished):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, from before the run was taken up again
        unfinished.rename(folder)
        sync(folder.parent)
    except Exception as error:
        problem = disk_problem(error)
        if problem is None or problem is error:
            raise
        raise problem from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def find_newest(output: Path) -> tuple[Path | None, list[str]]:
    """The complete checkpoint of the latest step, and what is wrong with the later ones.

    Returns:
        None if there is none, and for each that is damaged the beginning of a sentence.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(output)):
        fault = find_fault(path)
        if fault is None:
            return path, damaged
        damaged.append(f"{path.name} is damaged ({fault})")
    return None, damaged


def list_checkpoints(output: Path) -> list[Path]:
    """All checkpoints in a folder, whole or not, by their steps."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def find_fault(checkpoint: Path) -> str | None:
    """Which file is missing or has not the size or hash that the manifest names; None if all is well."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        expected = {name: (entry["size_bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        expected = {}
    if not expected:
        return f"{MANIFEST_FILE} cannot be read"
    for name, (size, digest) in expected.items():
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes in place of {size:,}"
            if _describe(checkpoint / name)["sha256"] != digest:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def forget_old(newest: Path, *, keep: int | None, best: str | None) -> None:
    """Delete what is older than the newest `keep` checkpoints, and not the one that the trainer calls the best.

    Args:
        newest: the newest whole one; those of later steps are damaged, and do not count.
    """
    if keep is None:
        return
    older = [path for path in list_checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    for path in older[:-keep]:
        if best is None or path.name != Path(best).name:
            shutil.rmtree(path, ignore_errors=True)


def sweep(output: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in output.glob(f".*{UNFINISHED}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _describe(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}
