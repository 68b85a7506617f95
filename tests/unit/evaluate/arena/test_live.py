"""Answers of running models: which two are asked, and what a rater hears when they do not answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from fourbit.errors import InputError
from fourbit.evaluate.arena.live import Live, Panel, Unanswered, read_live
from fourbit.evaluate.arena.pairs import PairSet
from fourbit.evaluate.arena.store import Store
from fourbit.evaluate.judge.endpoint import Fatal, Refused

URL = "http://localhost:8000/v1"


class Parrot:
    """Says its name and the prompt; or what it is told to raise."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error = name, error
        self.closed = False

    async def answer(self, prompt: str) -> str:
        if self.error is not None:
            raise self.error
        return f"{self.name}: {prompt}\ud800"

    async def close(self) -> None:
        self.closed = True


def test_the_two_that_met_least_are_asked(tmp_path: Path) -> None:
    with Store(tmp_path / "v.sqlite", make=True) as store:
        store.settle(PairSet(("a", "b", "c"), live=True))
        store.add_raters(["anna"])
        parrots = [Parrot(name) for name in "abc"]
        panel = Panel(parrots)
        for number in range(7):
            showing = asyncio.run(panel.ask(store, "anna", f"prompt {number}"))
            assert showing.question == f"prompt {number}"
            assert {showing.first[3:], showing.second[3:]} == {f"prompt {number}?"}
            store.vote("anna", showing.ticket, "A")
        assert sorted(Counter(store.pairs_by_systems()).values()) == [2, 2, 3]
        asyncio.run(panel.close())
        assert all(parrot.closed for parrot in parrots)


@pytest.mark.parametrize("error", [InputError("the tokenizer of b"), Refused("b refuses"), Fatal("http://b has no b")])
def test_a_rater_does_not_hear_who_failed(tmp_path: Path, error: Exception) -> None:
    said: list[str] = []
    with Store(tmp_path / "v.sqlite", make=True) as store:
        store.settle(PairSet(("guanaco", "base"), live=True))
        store.add_raters(["anna"])
        panel = Panel([Parrot("guanaco"), Parrot("base", error)], say=said.append)
        with pytest.raises(Unanswered, match="One of the models") as caught:
            asyncio.run(panel.ask(store, "anna", "hello"))
        assert "base" not in str(caught.value)
        assert store.pairs_by_systems() == {}
    (sentence,) = said
    assert sentence.startswith("base ")
    assert str(error) in sentence


def test_what_runs(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert read_live([f"one=m@{URL}", "org/m", f"x=a=b@c@{URL}x"], URL) == [
        Live("one", "m", URL),
        Live("m", "org/m", URL),
        Live("x", "a=b@c", URL + "x"),
    ]
    assert read_live([str(folder), f"other={folder}"], None) == [
        Live("model", str(folder), None),
        Live("other", str(folder), None),
    ]


@pytest.mark.parametrize(
    ("sources", "base_url", "words"),
    [
        (["a", "b"], None, "a is no folder"),
        (["a"], URL, "twice or more"),
        (["a", "a"], URL, "called 'a'"),
        ([f"x=@{URL}", "b"], URL, "names no model"),
    ],
)
def test_what_does_not(sources: list[str], base_url: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_live(sources, base_url)
