"""The arena in a real browser: raters who go away and come back, two at once, and answers that would rather be code."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fourbit.evaluate.arena.store import Store

ENABLED = "[data-choice=A]:enabled"


class Visit:
    """A rater in a browser of their own, and everything that should not happen there."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.context = browser.new_context(reduced_motion="reduce", **settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.trouble: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", lambda said: self.trouble.append(said.text))
        self.page.on("dialog", lambda dialog: (self.trouble.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.hosts.add(re.split(r"[/:]+", request.url)[1]))
        self.page.goto(url)

    def shown(self) -> tuple[str, str, str]:
        """The question and the answers, once they can be voted on."""
        self.page.wait_for_selector(ENABLED)
        return tuple(self.page.text_content(place).strip() for place in ("#question", "#a", "#b"))  # type: ignore[return-value]

    def vote(self, key: str) -> tuple[str, str, str]:
        """Press a key on what is shown, and wait until it is saved; returns what was shown."""
        shown, count = self.shown(), self.page.inner_text("#count")
        self.page.keyboard.press(key)
        self.page.wait_for_function("before => document.getElementById('count').textContent !== before", arg=count)
        return shown

    def wait_for_notice(self, text: str) -> None:
        """Until the page says so."""
        self.page.locator(".notice:visible", has_text=text).wait_for()

    def close(self) -> None:
        self.context.close()
        assert self.trouble == []
        assert self.hosts == {"127.0.0.1"}


@pytest.fixture(scope="module")
def arena(
    start: Callable[..., Any], answers: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder = tmp_path_factory.mktemp("arena")
    raters = "anna,ben,carl,dora,emil,fay,gus"
    found = start(
        *answers(folder, "guanaco", "other", prompts=4), "--votes", "votes.sqlite", "--raters", raters, folder=folder
    )
    found.path = folder / "votes.sqlite"
    return found


@pytest.fixture
def visit(arena: Any, browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens a rater's link in a fresh browser; what was left open is closed, and must have gone well."""
    open_ = []

    def go(rater: str, **settings: Any) -> Visit:
        open_.append(Visit(browser, arena.keys["raters"][rater], **settings))
        return open_[-1]

    yield go
    for one in open_:
        one.close()


def choices(arena: Any, rater: str) -> list[str]:
    with Store(arena.path) as store:
        return [vote.choice for vote in store.votes() if vote.rater == rater]


def test_a_rater_votes_through_a_set_and_comes_back_after_a_break(arena: Any, visit: Callable[..., Visit]) -> None:
    before = visit("anna")
    seen = [before.vote("a")]
    opened = before.shown()
    assert before.page.inner_text("#count") == "1 of 4"
    before.context.close()

    after = visit("anna")
    assert after.shown() == opened  # the same pair, in the same order
    seen += [after.vote(key) for key in ("4", "t")]
    seen.append(after.shown())
    after.page.get_by_role("button", name="Both bad").click()
    after.page.get_by_text("Thank you, anna!").wait_for()
    assert len({question for question, _, _ in seen}) == 4
    assert choices(arena, "anna") == ["A", "B", "tie", "both bad"]
    again = visit("anna")
    again.page.get_by_text("You have voted on all 4 pairs").wait_for()
    with Store(arena.path) as store:
        for (_, first, _), vote in zip(seen, (one for one in store.votes() if one.rater == "anna"), strict=True):
            from_second = first.endswith("??") or first.startswith("<b>")
            assert vote.systems == (("other", "guanaco") if from_second else ("guanaco", "other"))


def test_two_raters_at_once(arena: Any, visit: Callable[..., Visit]) -> None:
    ben, carl = visit("ben"), visit("carl")
    for choice in "bx":
        shown = [rater.vote(key) for rater, key in ((ben, "a"), (carl, choice))]
        assert shown[0][0] == shown[1][0]  # the same pairs in the same turn, so that they overlap
    assert choices(arena, "ben") == ["A", "A"]
    assert choices(arena, "carl") == ["B", "both bad"]


def test_answers_stay_text(arena: Any, visit: Callable[..., Visit]) -> None:
    while arena.ask("/api/next", arena.token("dora")).json["pair"]["text"]["question"] != "What is 0?":
        arena.vote("dora", "tie")
    dora = visit("dora", viewport={"width": 1200, "height": 700})
    page, shown = dora.page, dora.shown()
    (hostile,) = (text for text in shown[1:] if "script" in text)
    (long_line,) = (text for text in shown[1:] if "script" not in text)
    assert hostile.startswith("<script>document.title = 'caught'</script>")
    assert "<img src=x onerror=" in hostile
    assert "[click](javascript:alert(1)) site (http://example.org/away) [image: seen]" in hostile
    assert hostile.endswith("<h1 id=inserted>larger</h1>")
    assert long_line == "<b>" + "x" * 100_000
    assert page.title() != "caught"
    assert page.locator("#inserted, .text script, .text img, .text a, .text b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    boxes = [page.locator(f"#{name}").bounding_box() for name in "ab"]
    assert all(
        box["y"] + box["height"] < 640 for box in boxes
    )  # long as they are, they scroll, and the buttons are seen
    page.keyboard.press("p")
    plain = {page.text_content(f"#{name}") for name in "ab"}
    assert "<b>" + "x" * 100_000 in plain
    assert any("[site](http://example.org/away)" in text for text in plain)
    assert page.locator("#inserted").count() == 0

    page.set_viewport_size({"width": 360, "height": 640})  # on a phone, after dark
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("A is better", "Tie", "Both bad", "B is better"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["y"] + box["height"] <= 640  # in view without scrolling
        assert min(box["width"], box["height"]) >= 44
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background)[:3])) < 120


def test_a_slip_can_be_mended_and_a_held_key_votes_once(arena: Any, visit: Callable[..., Visit]) -> None:
    emil = visit("emil")
    page = emil.page
    first = emil.shown()
    for key in ("Control+a", "Alt+b", "z", "Tab"):
        page.keyboard.press(key)
    page.keyboard.down("a")
    page.keyboard.down("a")  # what a keyboard sends of a key that is held
    page.keyboard.up("a")
    second = emil.shown()
    page.keyboard.press("a")
    page.keyboard.press("a")  # too soon after the first to be meant for the next pair
    third = emil.shown()
    assert len({first, second, third}) == 3
    assert choices(arena, "emil") == ["A", "A"]
    page.keyboard.press("u")
    emil.wait_for_notice("This is the pair you voted on last. Choose again to change your vote.")
    assert emil.shown() == second
    assert page.get_by_role("button", name="A is better", pressed=True).count() == 1
    page.get_by_role("button", name="Keep my vote").click()
    page.wait_for_function("text => document.getElementById('question').textContent.trim() === text", arg=third[0])
    emil.shown()
    page.keyboard.press("u")
    page.get_by_role("button", name="Both bad").click()
    emil.wait_for_notice("Changed to: Both bad.")
    assert emil.shown() == third
    assert choices(arena, "emil") == ["A", "both bad"]
    page.get_by_role("button", name="Keys on").click()
    page.keyboard.press("b")
    page.reload()
    assert emil.shown() == third
    page.keyboard.press("b")
    assert choices(arena, "emil") == ["A", "both bad"]


def test_a_vote_waits_for_a_server_that_was_killed(
    start: Callable[..., Any], answers: Callable[..., list[Path]], browser: Any, tmp_path: Path
) -> None:
    options = ("--votes", "votes.sqlite", "--raters", "anna")
    arena = start(*answers(tmp_path, "a", "b", prompts=2), *options, folder=tmp_path)
    page = browser.new_page()
    page.goto(arena.keys["raters"]["anna"])
    page.wait_for_selector(ENABLED)
    arena.kill()
    page.keyboard.press("b")
    page.locator(".notice:visible", has_text="Not saved yet").wait_for()
    again = start(*options, "--port", urlsplit(arena.keys["organiser"]).port, folder=tmp_path)
    page.get_by_text("1 of 2").wait_for()
    with Store(tmp_path / "votes.sqlite") as store:
        assert [vote.choice for vote in store.votes()] == ["B"]
    assert again.keys["raters"] == arena.keys["raters"]
    page.close()


def test_the_organiser_sees_it_come_in(arena: Any, browser: Any) -> None:
    organiser = Visit(browser, arena.keys["organiser"])
    page = organiser.page
    names = page.locator("#raters td.name")
    names.last.wait_for()
    assert names.all_inner_texts() == ["anna", "ben", "carl", "dora", "emil", "fay", "gus"]
    for choice in ("A", "B", "tie", "tie"):
        for rater in ("fay", "gus"):
            arena.vote(rater, choice)
    page.locator("#raters tr", has_text="gus").get_by_text("4 of 4").wait_for(timeout=30_000)
    assert page.locator("#agreement tr", has_text="fay").filter(has_text="gus").count() == 1
    assert "guanaco, other" in page.inner_text("h1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download votes").click()
    records = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    with Store(arena.path) as store:
        assert len(records) == store.vote_count
    organiser.close()


def test_an_unknown_link_says_so(arena: Any, browser: Any) -> None:
    page = browser.new_page()
    for link in (arena.keys["raters"]["anna"][:-1], arena.keys["organiser"] + "x", arena.keys["organiser"][:30]):
        reply = page.goto(link)
        assert reply.status in (403, 404)
        assert page.get_by_role("heading", name="This link is not known here").count() == 1
    page.close()
