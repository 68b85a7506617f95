"""Judgements that were never asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fourbit.evaluate.answers import Answered
from fourbit.evaluate.judge.ratings import Judgement
from fourbit.evaluate.judge.requests import Request
from fourbit.evaluate.judge.store import Reply
from fourbit.evaluate.judge.template import load_template
from fourbit.evaluate.judge.verdicts import read_reply


@pytest.fixture
def judgement() -> Callable[..., Judgement]:
    """Makes one: a prompt's number, the order, what the judge said, and the lengths of the pair's two answers."""
    template = load_template("verdict")

    def make(
        prompt: int, order: int, said: str, lengths: tuple[int, int] = (1, 1), pair: tuple[str, str] = ("a", "b")
    ) -> Judgement:
        texts = [Answered(prompt, "?", "x" * length, "here") for length in lengths]
        first, second = texts if order == 1 else texts[::-1]
        request = Request(f"{pair}{prompt}{order}", prompt, pair, order, "?", first, second, template, 100)
        mode = "scores" if said.startswith("Scores") else "verdict"
        return Judgement(request, Reply(said, "stop", 1, 1, True, 1.0), read_reply(said, mode))

    return make
