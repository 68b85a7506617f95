"""Markdown of strangers: formatted, and nothing of it alive."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fourbit.serve.markdown import LONGEST, render

TAGS = {
    *("h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "ul", "ol", "li", "blockquote", "div", "pre"),
    *("table", "thead", "tbody", "tr", "th", "td", "em", "strong", "s", "span", "code"),
}
ATTRIBUTES = {
    "class": {"link", "url", "code", "language", "plain", "left", "right", "centre"},
    "tabindex": {"0"},
}
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1)) <javascript:alert(1)>",
    "![x](javascript:alert(1)) ![x](data:text/html;base64,PHNjcmlwdD4=)",
    '[x](http://a.b/"onmouseover=alert(1)) ![x"onload=alert(1)](y)',
    '```"><script>alert(1)</script>\n<script>\n```',
    "    <script>alert(1)</script>",
    "| <b>a</b> |\n|--|\n| <script>alert(1)</script> |",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;script&#62;",
    "[a]: http://example.org/<script>\n[a] <http://example.org/?<script>>",
    "<!-- --><style>*{display:none}</style><base href=//evil><meta http-equiv=refresh>",
    "</div></article></main><form action=//evil><button>A is better",
    "\x00<\x00script>\u202e\u2066",
]


class Reader(HTMLParser):
    """Refuses whatever the page is not meant to hold, and keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.said = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attributes:
            if name == "start":
                assert tag == "ol"
                assert str(value).isdecimal()
            else:
                assert value in ATTRIBUTES[name], (tag, name, value)

    def handle_data(self, data: str) -> None:
        self.said += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = unknown_decl = handle_pi = handle_comment


def read(text: str) -> str:
    reader = Reader()
    reader.feed(render(text))
    reader.close()
    return reader.said


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_lives(text: str) -> None:
    said = read(text)
    if "<script>" in text:
        assert "<script>" in said  # it is shown as it is written


@given(st.text(st.sampled_from("<>&\"'`[]()!*_#|-:\n /=abj\\~\x00") | st.characters(codec="utf-8"), max_size=200))
@example("[a](<b>) ![c](d 'e') <f@g.h>")
def test_no_text_makes_other_tags(text: str) -> None:
    read(text)


def test_what_is_formatted() -> None:
    html = render("# T\n\none\ntwo **b** *i* `c` ~~s~~\n\n1. x\n2. y\n\n|a|b|\n|:-|-:|\n|1|2|\n\n```py\nx < 1\n```")
    for piece in (
        "<h1>T</h1>",
        "one<br />\ntwo <strong>b</strong> <em>i</em> <code>c</code> <s>s</s>",
        "<ol>\n<li>x</li>",
        '<th class="left">a</th>\n<th class="right">b</th>',
        '<span class="language">py</span><pre tabindex="0"><code>x &lt; 1\n</code></pre>',
    ):
        assert piece in html


def test_links_lead_nowhere_and_say_where_they_would() -> None:
    assert read(
        "[here *now*](https://example.org/a?b=1&c) <https://example.org> ![cat](https://example.org/c.png)"
    ) == ("here now (https://example.org/a?b=1&c) https://example.org [image: cat] (https://example.org/c.png)\n")
    assert not re.search(r"<a|<img|href|src=", render("[a](http://b) ![c](http://d)"))


def test_a_long_line_is_text() -> None:
    text = "<b>" + "x" * 100_000 + "[a](b)"
    assert read(text) == text
    assert render("*" + "x" * (LONGEST - 2) + "*").startswith("<p><em>")
    assert render("*" + "x" * (LONGEST - 1) + "*").startswith('<div class="plain">*')


def test_deep_nesting_ends() -> None:
    for text in ("> " * 5000 + "x", "[" * 5000 + "x", "*" * 5000 + "x", "- " * 5000 + "x", "**a *b " * 2000):
        read(text)
