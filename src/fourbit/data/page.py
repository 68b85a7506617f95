"""What a lint found, as one HTML file that needs nothing beside it."""

from __future__ import annotations

from pathlib import Path

from fourbit.data.checks import NOTE, OK, PROBLEM
from fourbit.data.colours import KINDS_OF_TOKENS
from fourbit.data.lint import Lint
from fourbit.pages import render_page, short_name

__all__ = ["TEMPLATE", "write_page"]

TEMPLATE = "lint.html.j2"

_ORDER = (PROBLEM, NOTE, OK)


def write_page(lint: Lint, *, model: str, data: str) -> str:
    """The text of the page: the verdicts, the lengths, and samples whose tokens are coloured.

    Args:
        model, data: what was given, for the title.
    """
    numbers = lint.numbers
    most = max((count for _, _, count in lint.histogram), default=1)
    return render_page(
        Path(__file__).with_name(TEMPLATE),
        model=short_name(model),
        data=short_name(data),
        numbers=numbers,
        refusal=lint.refusal,
        sentences=lint.sentences,
        checks=sorted(lint.checks, key=lambda check: _ORDER.index(check.verdict)),
        bars=[
            (f"{low:,}" if high is not None else f"over {low - 1:,}", count, 100 * count / most, low > lint.max_length)
            for low, high, count in lint.histogram
        ],
        kinds=KINDS_OF_TOKENS,
        samples=lint.samples,
    )
