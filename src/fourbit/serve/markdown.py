"""Markdown of strangers as HTML that does nothing: no tags of theirs, no links to follow, no pictures to load.

Whatever is written as HTML is shown as it is written. A link shows where it would lead, and an image its text, so that
no answer can send a rater somewhere, or tell a server that it was looked at.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict

__all__ = ["LONGEST", "render"]

LONGEST = 60_000
"""Characters of an answer that is read as Markdown, within a second whatever they are; more are shown as plain text."""

_OPTIONS = {"html": False, "breaks": True, "maxNesting": 100}
"""Answers mean their line breaks; what is nested deeper than so many levels the parser leaves out."""

_ALIGNMENTS = {"text-align:left": "left", "text-align:center": "centre", "text-align:right": "right"}


class _Renderer(RendererHTML):
    """markdown-it's, without anything that can be followed, loaded or styled."""

    def link_open(
        self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        env.setdefault("links", []).append(str(tokens[index].attrGet("href") or ""))
        return '<span class="link">'

    def link_close(
        self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        target = env["links"].pop()
        inside = "".join(token.content for token in tokens[_opening(tokens, index) : index])
        return "</span>" if inside == target else f'</span> <span class="url">({escapeHtml(target)})</span>'

    def image(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        token = tokens[index]
        said = self.renderInlineAsText(token.children, options, env) if token.children else ""
        target = str(token.attrGet("src") or "")
        return f'<span class="link">[image: {escapeHtml(said)}]</span> <span class="url">({escapeHtml(target)})</span>'

    def td_open(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return self._cell(tokens[index])

    def th_open(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        return self._cell(tokens[index])

    @staticmethod
    def _cell(token: Token) -> str:
        name = _ALIGNMENTS.get(str(token.attrGet("style") or ""))  # the page's policy takes no styles of its content
        return f'<{token.tag} class="{name}">' if name else f"<{token.tag}>"

    def fence(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]) -> str:
        language = tokens[index].info.strip().split(maxsplit=1)[:1]
        label = f'<span class="language">{escapeHtml(language[0][:30])}</span>' if language else ""
        return (
            f'<div class="code">{label}<pre tabindex="0"><code>{escapeHtml(tokens[index].content)}</code></pre></div>\n'
        )

    def code_block(
        self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        return self.fence(tokens, index, options, env)


def _opening(tokens: Sequence[Token], close: int) -> int:
    return next(at for at in range(close, -1, -1) if tokens[at].type == "link_open") + 1


_MARKDOWN = MarkdownIt("commonmark", _OPTIONS, renderer_cls=_Renderer).enable(["table", "strikethrough"])


@lru_cache(maxsize=256)
def render(text: str) -> str:
    """The HTML of a Markdown text; of a text that is too long, the text itself."""
    if len(text) > LONGEST:
        return f'<div class="plain">{escapeHtml(text)}</div>'
    try:
        return str(_MARKDOWN.render(text, {}))
    except RecursionError:
        return f'<div class="plain">{escapeHtml(text)}</div>'
