"""The command line: one file per verb, thin. Whatever a verb needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows `fourbit`; None takes them from the process.

    Returns:
        the exit code: 0 done, 1 our fault, 2 the user's input is at fault, 130 interrupted.
    """
    try:
        from fourbit.cli import app
    except KeyboardInterrupt:
        return 130
    return app.run(arguments)
