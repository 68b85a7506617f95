"""The errors a user can cause, each worth one clear sentence.

The command line turns every `InputError` into that sentence and exit code 2; anything else that escapes is our fault
and exits with 1. A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

__all__ = [
    "AdapterMismatch",
    "BrokenCheckpoint",
    "InputError",
    "InvalidBlockSize",
    "MissingExtra",
    "NonFiniteWeight",
    "NotAModel",
    "OutputExists",
    "RunExists",
    "UnknownFormat",
    "UnsupportedDtype",
]


class InputError(ValueError):
    """What the user gave cannot be used as it is."""


class UnknownFormat(InputError):
    """A number format that does not exist."""


class InvalidBlockSize(InputError):
    """A block size that no backend can take."""


class UnsupportedDtype(InputError):
    """A tensor whose dtype cannot be quantized or computed with."""


class NonFiniteWeight(InputError):
    """A weight that holds NaN or infinity; the message names the tensor where its name is known."""


class NotAModel(InputError):
    """A path or hub name behind which there is no usable model."""


class BrokenCheckpoint(InputError):
    """A checkpoint with a missing, truncated, corrupt or wrongly shaped part; the message names it."""


class AdapterMismatch(InputError):
    """An adapter that does not belong to the model it was given with."""


class OutputExists(InputError):
    """An output path that holds something we did not write."""


class RunExists(OutputExists):
    """An output that holds a run of ours, which can be gone on with."""


class MissingExtra(InputError):
    """An optional library is needed and not installed; the message says what to install."""
