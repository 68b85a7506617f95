"""Files that are whole at any moment, and on the disk when we say so."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["UNFINISHED", "replace_file", "sync"]

UNFINISHED = ".unfinished"
"""The end of the name of what is being written."""


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that there is either the old or the new one at any moment; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
