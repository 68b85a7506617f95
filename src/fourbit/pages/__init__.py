"""Pages as one HTML file that needs nothing beside it: their common look, and how their templates are filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourbit.errors import MissingExtra

__all__ = ["render_page", "short_name"]


def render_page(template: Path, **values: Any) -> str:
    """The text of a page; what is filled in is escaped.

    Args:
        template: a Jinja file; `{% include "base.css" %}` gives it the look of the other pages.

    Raises:
        MissingExtra: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtra("Pages need jinja2; install it with `pip install jinja2`.") from error

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(**values)


def short_name(path: str) -> str:
    """The last part of a path; a hub name whole."""
    return Path(path).name if path.startswith((".", "/", "~")) or Path(path).exists() else path
