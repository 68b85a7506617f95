"""Answers made while people ask: two servers, a rater in the browser, and what is heard when one of them fails."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fourbit.evaluate.arena.store import Store

SERVER = Path(__file__).resolve().parents[1] / "judge/judge_server.py"


@pytest.fixture(scope="module")
def models() -> Iterator[list[Any]]:
    """Two OpenAI-compatible servers, which say what they were asked, each in its way."""
    spec = importlib.util.spec_from_file_location("arena_models", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [module.JudgeServer(), module.JudgeServer()]
    found[0].answer = lambda prompt: f"Yes: **{prompt}**"
    found[1].answer = lambda prompt: f"No: {prompt} <script>document.title = 'caught'</script>"
    yield found
    for server in found:
        server.stop()


@pytest.fixture(scope="module")
def arena(start: Callable[..., Any], models: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("arena")
    live = [f"guanaco-33b=toy@{models[0].url}", f"zebra-7b=toy@{models[1].url}"]
    given = [argument for one in live for argument in ("--live", one)]
    found = start(*given, "--votes", "live.sqlite", "--raters", "anna,ben", folder=folder)
    found.path = folder / "live.sqlite"
    return found


def test_a_rater_asks_and_votes(arena: Any, models: list[Any], browser: Any, fourbit_here: Callable[..., Any]) -> None:
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.goto(arena.keys["raters"]["anna"])
    for number in range(2):
        page.get_by_label("What do you want to ask?").fill(f"Is it {number}?")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("[data-choice=A]:enabled")
        assert page.text_content("#question").strip() == f"Is it {number}?"
        answers = {page.text_content(f"#{name}").strip() for name in "ab"}
        assert answers == {f"Yes: Is it {number}?", f"No: Is it {number}? <script>document.title = 'caught'</script>"}
        page.reload()
        page.wait_for_selector("[data-choice=A]:enabled")
        assert {page.text_content(f"#{name}").strip() for name in "ab"} == answers
        first_is_yes = page.text_content("#a").strip().startswith("Yes")
        page.get_by_role("button", name="A is better" if first_is_yes else "B is better").click()
        page.get_by_text(f"{number + 1} vote", exact=False).first.wait_for()
        assert page.input_value("#prompt") == ""
    assert page.title() == "fourbit arena"
    page.close()
    assert [body["messages"] for body in models[0].bodies] == [
        [{"role": "user", "content": f"Is it {n}?"}] for n in (0, 1)
    ]
    with Store(arena.path) as store:
        votes = store.votes()
    assert [vote.systems["AB".index(vote.choice)] for vote in votes] == ["guanaco-33b"] * 2
    done = fourbit_here("arena", "--votes", arena.path, "--export", "ratings.jsonl", "--json")
    assert json.loads(done.out)["ratings"] == 2
    assert "name them again" in fourbit_here("arena", "--votes", arena.path, "--port", "0").complaint


def test_a_model_that_fails_is_not_named(arena: Any, models: list[Any]) -> None:
    token = arena.token("ben")

    def answer(prompt: str) -> Any:
        assert arena.ask("/api/ask", token, {"prompt": prompt}).json == {"state": "answering"}
        assert arena.ask("/api/ask", token, {"prompt": prompt}).status in (200, 409)
        deadline = time.monotonic() + 20
        while (found := arena.ask("/api/next", token)).json["state"] == "answering":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return found

    models[1].behave = lambda number, prompt: (404, {"error": {"message": "zebra-7b is not here"}})
    unreachable = answer("Hello?")
    assert unreachable.json["state"] == "ask"
    assert unreachable.json["refusal"].startswith("One of the models cannot be reached")
    models[1].behave = lambda number, prompt: (400, {"error": {"message": "zebra-7b says no"}})
    refused = answer("Hello?")
    assert refused.json["refusal"].startswith("One of the models cannot take this prompt")
    models[1].behave = lambda number, prompt: "drop" if len(models[1].bodies) % 2 else "ok"  # it is asked again
    shown = answer("Hello!")
    assert shown.json["state"] == "pair"
    for reply in (unreachable, refused, shown):
        assert not any(name in reply.body for name in (b"guanaco", b"zebra", b"127.0.0.1"))
    for prompt in ("", " \n", "x" * 20_001):
        assert arena.ask("/api/ask", arena.token("anna"), {"prompt": prompt}).status == 422
    assert "zebra-7b does not answer: " in arena.said
    assert "zebra-7b refuses a prompt: " in arena.said
