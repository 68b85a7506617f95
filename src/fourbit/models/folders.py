"""Model folders: where one is, and how a new one comes to be all at once or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fourbit import __version__
from fourbit.errors import InputError, NotAModel, OutputExists
from fourbit.files import sync

__all__ = [
    "CONFIG_FILE",
    "MANIFEST_FILE",
    "check_output",
    "disk_problem",
    "locate",
    "name_disk_problem",
    "new_folder",
]

CONFIG_FILE = "config.json"
MANIFEST_FILE = "fourbit.json"
"""Lists what we wrote into a folder: only a folder that holds nothing else is ever replaced."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_TIMEOUT_S = 10
_DISK_PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file became larger than the system allows",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
}

_SIGNS_OF_A_FULL_DISK = ("No space left", "PytorchStreamWriter failed writing", "inline_container.cc")


def locate(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    kind: str = "model",
    only: Sequence[str] | None = None,
) -> Path:
    """The local folder of a model or adapter, downloaded first where it is a name on the Hugging Face hub.

    Args:
        name: a folder, or a hub name such as `org/model`. A folder of that name wins.
        revision: branch, tag or commit on the hub.
        kind: what error messages call it.
        only: patterns of the files that are wanted, where not all have to be downloaded.

    Raises:
        NotAModel: there is no such folder, or no such name on the hub, or the hub cannot be reached.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir():
        if revision is not None:
            raise NotAModel(f"{text} is a folder, which has no revision {revision!r}; leave the revision out.")
        return path
    if path.exists():
        raise NotAModel(f"{text} is a file; a {kind} is a folder, or a name on the Hugging Face hub.")
    if not _HUB_NAME.fullmatch(text) or text.startswith("."):
        raise NotAModel(f"There is no folder {text}.")
    return _download(text, revision, kind, _WANTED if only is None else only)


def _download(name: str, revision: str | None, kind: str, wanted: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(wanted), etag_timeout=_TIMEOUT_S
        )
    except errors.GatedRepoError as error:
        raise NotAModel(
            f"{name} is gated: ask for access on its page on the hub, then log in (`hf auth login`)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NotAModel(f"The hub has no revision {revision!r} of {name}.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise NotAModel(
            f"There is no folder {name} here, and no {kind} of that name on the hub that you can see."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise NotAModel(
            f"There is no folder {name} here, it is not in the local cache of the hub, and the hub cannot be reached"
            " (offline?)."
        ) from error
    return Path(found)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output path that holds something we did not write, or that may not be replaced.

    Raises:
        OutputExists.
    """
    if output.exists() and (output.resolve() == Path.cwd() or os.path.ismount(output)):
        raise OutputExists(
            f"{output} is where you stand, or a mount point, and cannot be replaced; name a folder in it."
        )
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise OutputExists(f"{output} exists and is no folder; choose another output.")
    if not output.exists() or not any(output.iterdir()):
        return
    ours = _is_ours(output)
    if ours and not overwrite:
        raise OutputExists(f"{output} exists already; pass overwrite=True (--overwrite), or choose another output.")
    if not ours:
        raise OutputExists(f"{output} holds files that fourbit did not write; choose another output.")


def _is_ours(folder: Path) -> bool:
    try:
        listed = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        if isinstance(listed, list):  # the names in a folder that is filled bit by bit, as the demo's is
            return {path.name for path in folder.iterdir()} <= {MANIFEST_FILE, *listed}
        return bool(_sizes(folder).items() <= listed.items())  # what the user put in its place has another size
    except (AttributeError, OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def new_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        OutputExists: see `check_output`. InputError: the disk is full or cannot be written to.
    """
    check_output(output, overwrite=overwrite)
    folder: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = output.parent / f".{output.name}.{secrets.token_hex(4)}.unfinished"
        folder.mkdir()
        yield folder
        _write_manifest(folder)
        for path in (*folder.rglob("*"), folder):
            sync(path)
        _take_place(folder, output)
    except OSError as error:
        if disk_problem(error) is None:
            raise
        raise InputError(
            f"{output} could not be written: {name_disk_problem(error)}. Nothing is left of it."
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    manifest = {"written_by": f"fourbit {__version__}", "files": _sizes(folder)}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    """Every file of a folder but the manifest, by its path within."""
    files = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    sizes = {path.relative_to(folder).as_posix(): path.lstat().st_size for path in files}
    return {name: size for name, size in sizes.items() if name != MANIFEST_FILE}


def _take_place(folder: Path, output: Path) -> None:
    old = None
    if output.exists():
        old = folder.with_suffix(".old")
        output.rename(old)
    try:
        folder.rename(output)
    except OSError:
        if old is not None:
            old.rename(output)
        raise
    sync(output.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def disk_problem(error: BaseException) -> OSError | None:
    """The error of the disk behind an exception, where it is one that a user can mend; None for any other.

    safetensors and torch report a full disk by exceptions of their own.
    """
    if isinstance(error, OSError):
        return error if error.errno in _DISK_PROBLEMS else None
    if any(sign in str(error) for sign in _SIGNS_OF_A_FULL_DISK):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def name_disk_problem(error: OSError) -> str:
    """What `disk_problem` found, in words: "the disk is full"."""
    return _DISK_PROBLEMS[error.errno or errno.ENOSPC]
