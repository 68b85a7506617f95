"""Text out of tokens, one at a time."""

from __future__ import annotations

from typing import Any

import pytest

from fourbit.generate.conversation import Prompt
from fourbit.generate.endings import Endings
from fourbit.generate.growing import Growing, Pieces

TEXTS = [
    "Once upon a time, there was a dog.",
    "naïve café — “quoted” 日本語 🐕‍🦺 done",
    "  two spaces,\n\n\tand a tab \n",
    "🐕",
]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def grow(tokenizer: Any, text: str, *, stop: tuple[str, ...] = (), limit: int = 1000, chat: bool = False) -> Growing:
    """An answer fed until it ends, after checking at each token that nothing settled is taken back."""
    growing = Growing(tokenizer, Prompt("", (1,), chat), endings=Endings(frozenset({2}), stop), limit=limit)
    settled = ""
    for token in ids_of(tokenizer, text):
        growing.push(token)
        assert growing.settled.startswith(settled)
        settled = growing.settled
        if growing.finish_reason:
            break
    if growing.finish_reason is None:
        growing.push(2)
    assert growing.text.startswith(settled)
    return growing


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str, tokenizer: Any) -> None:
    """The tokenizer spreads what it does not know over one token per byte."""
    before, ids = ids_of(tokenizer, "Tim said"), ids_of(tokenizer, text)
    pieces = Pieces(tokenizer, before)
    parts = [pieces.push(token) for token in ids] + [pieces.rest()]
    assert not any("�" in part for part in parts)
    assert "Tim said" + "".join(parts) == tokenizer.decode(before + ids, clean_up_tokenization_spaces=False)


def test_a_character_that_never_becomes_whole_is_shown_at_the_end(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "🐕")[:-1]
    pieces = Pieces(tokenizer, [])
    assert [pieces.push(token) for token in ids] == [""] * len(ids)
    assert "�" in pieces.rest()


@pytest.mark.parametrize("text", TEXTS)
def test_it_ends_at_the_end_token(text: str, tokenizer: Any) -> None:
    growing = grow(tokenizer, text)
    assert growing.finish_reason == "stop"
    assert growing.ids[-1] == 2
    assert growing.text.strip() == text.strip()


def test_a_turn_has_no_white_space_around_it(tokenizer: Any) -> None:
    growing = grow(tokenizer, "\n  A dog. \n\n", chat=True)
    assert growing.text == growing.settled == "A dog."


@pytest.mark.parametrize("stop", ["### Human", "#", "Human", ".\n#"])
def test_a_stop_string_ends_it_and_is_cut_off(stop: str, tokenizer: Any) -> None:
    growing = grow(tokenizer, "A dog.\n### Human: and a cat", stop=(stop, "never there"))
    assert growing.finish_reason == "stop"
    assert growing.text.lstrip() == "A dog.\n### Human: and a cat".partition(stop)[0]
    assert 2 not in growing.ids


def test_what_only_looked_like_a_stop_string_is_kept(tokenizer: Any) -> None:
    text = "A ### Hu ## dog ### Hum"
    assert grow(tokenizer, text, stop=("### Human",)).text.lstrip() == text


def test_the_limit(tokenizer: Any) -> None:
    growing = grow(tokenizer, "Once upon a time, there was a dog.", limit=5)
    assert (growing.finish_reason, len(growing.ids)) == ("length", 5)
