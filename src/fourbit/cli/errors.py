"""What an exception means to the person at the terminal: an exit code and one sentence."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback

from fourbit.errors import InputError

__all__ = ["INTERRUPTED", "OUR_FAULT", "USER_FAULT", "Interrupted", "debugging", "explain"]

OUR_FAULT, USER_FAULT, INTERRUPTED = 1, 2, 130

_SYSTEM_PROBLEMS = {
    errno.EACCES: "Permission denied",
    errno.EDQUOT: "The disk quota is used up",
    errno.EEXIST: "It exists already",
    errno.EISDIR: "A file is needed, and this is a folder",
    errno.ENAMETOOLONG: "The name is too long",
    errno.ENOENT: "No such file or folder",
    errno.ENOSPC: "The disk is full; free some space or choose another place",
    errno.ENOTDIR: "A folder is needed, and this is a file",
    errno.EPERM: "Not permitted",
    errno.EROFS: "The disk is read-only",
}
"""Problems of the machine that the user can mend; any other OSError is ours."""


class Interrupted(Exception):
    """A verb ended early because it was asked to; the message says how to go on."""


def debugging() -> bool:
    """Whether FOURBIT_DEBUG asks for tracebacks and for the libraries' own messages."""
    return os.environ.get("FOURBIT_DEBUG", "") not in ("", "0")


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for an exception; shows or saves the traceback where that helps."""
    if debugging():
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "Interrupted."
    if isinstance(error, Interrupted):
        return INTERRUPTED, str(error)
    if hasattr(error, "format_message"):  # typer's own usage errors
        return USER_FAULT, _usage(error)
    if isinstance(error, InputError):
        return USER_FAULT, str(error)
    if isinstance(error, OSError) and error.errno in _SYSTEM_PROBLEMS:
        where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
        return USER_FAULT, f"{_SYSTEM_PROBLEMS[error.errno]}{where}."
    if isinstance(error, MemoryError):
        return USER_FAULT, "There is not enough memory for this on the machine."
    return OUR_FAULT, _our_fault(error)


def _usage(error: BaseException) -> str:
    message = str(getattr(error, "format_message", error.__str__)()).strip().removesuffix(".")
    context = getattr(error, "ctx", None)
    command = "fourbit" if context is None else context.command_path
    hint = f"`{command} --help` shows what is possible."
    return f"{message}{'' if message.endswith('?') else '.'} {hint}"


def _our_fault(error: BaseException) -> str:
    what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    start = f"This should not have happened, and is a fault of fourbit ({what});"
    if debugging():
        return f"{start} please report it with the traceback above and the output of `fourbit doctor`."
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fourbit-traceback-", suffix=".txt", delete=False) as file:
            file.write(trace)
    except OSError:
        return f"{start} please run it again with FOURBIT_DEBUG=1 and report what it shows."
    return f"{start} please report it with {file.name} and the output of `fourbit doctor`."
