"""A conversation that goes on."""

from __future__ import annotations

from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.generate import Loaded, Sampling, generate
from fourbit.generate.session import Session

SHORT = Sampling(max_new_tokens=12)


def test_each_answer_sees_what_was_said_before(loaded: Loaded) -> None:
    session = Session(loaded, settings=SHORT, system="Be kind.")
    first = "".join(session.ask("Hello"))
    second = "".join(session.ask("And then?"))
    assert session.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": second},
    ]
    (expected,) = generate(loaded.model, loaded.tokenizer, [session.messages[:-1]], settings=SHORT)
    assert second == expected.text
    assert session.tokens == 24


def test_an_answer_that_was_stopped_is_kept_as_far_as_it_came(loaded: Loaded) -> None:
    session = Session(loaded, settings=Sampling(max_new_tokens=300))
    pieces = session.ask("Hello")
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert [turn["content"] for turn in session.turns] == ["Hello", heard]
    again = session.ask("Hello?")
    again.close()  # before it began
    assert len(session.turns) == 2


def test_answering_anew_draws_anew(loaded: Loaded) -> None:
    session = Session(loaded, settings=Sampling(max_new_tokens=30, temperature=1.0))
    first = "".join(session.ask("Hello"))
    assert session.take_back() == "Hello"
    assert session.turns == []
    assert "".join(session.ask("Hello")) != first
    assert Session(loaded, settings=SHORT).take_back() is None


def test_the_same_seed_gives_the_same_conversation(loaded: Loaded) -> None:
    def talk() -> list[dict[str, str]]:
        session = Session(loaded, settings=Sampling(max_new_tokens=15, temperature=1.0, seed=4))
        for said in ("Hello", "And?"):
            list(session.ask(said))
        return session.turns

    assert talk() == talk()


def test_the_oldest_turns_make_room(loaded: Loaded) -> None:
    """The model sees 512 tokens, of which a quarter is kept for an answer of up to 200."""
    session = Session(loaded, settings=Sampling(max_new_tokens=200, stop=(".",)), system="Be kind.")
    said = "There was a boy who loved to play in the park with his dog and his friends. " * 3
    for _ in range(3):
        list(session.ask(said))
    assert session.forgotten == 0
    for _ in range(3):
        list(session.ask(said))
    assert session.forgotten >= 2
    assert session.forgotten % 2 == 0
    assert len(session.messages) == 13
    session.reset()
    assert (session.messages, session.forgotten) == ([{"role": "system", "content": "Be kind."}], 0)


def test_what_is_too_long_is_not_kept(loaded: Loaded) -> None:
    session = Session(loaded, settings=SHORT)
    list(session.ask("Hello"))
    with pytest.raises(InputError, match=r"too long: with the template around it .* sees 512 at most"):
        list(session.ask("a dog " * 400))
    assert len(session.turns) == 2
    assert "".join(session.ask("And?"))


def test_a_failure_leaves_the_history_as_it_was(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(loaded, settings=SHORT)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(loaded.model, "generate", fail)
    with pytest.raises(MemoryError):
        list(session.ask("Hello"))
    assert session.turns == []
