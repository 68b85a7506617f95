"""The words that the judge reads, and that answers cannot change them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourbit.evaluate.judge.template import MODES, load_template

TEXTS = st.one_of(st.text(), st.sampled_from(["{first}", "{second} {question}", "{fence}", "\\1 \\g<0>", "%s {0}"]))


@pytest.mark.parametrize("mode", MODES)
@given(TEXTS, TEXTS, TEXTS)
def test_texts_stand_in_the_prompt_as_they_are(mode: str, question: str, first: str, second: str) -> None:
    system, user = load_template(mode).render(question, first, second)
    assert (system["role"], user["role"]) == ("system", "user")
    marks = [line for line in user["content"].split("\n") if line.startswith("---- ")]
    fence = marks[0].split()[1]
    assert fence not in question + first + second
    expected = (
        f"---- {fence} request ----\n{question}\n---- {fence} answer 1 ----\n{first}\n"
        f"---- {fence} answer 2 ----\n{second}\n---- {fence} end ----\n"
    )
    assert expected in user["content"]


@pytest.mark.parametrize("mode", MODES)
def test_our_prompts_are_fair(mode: str) -> None:
    text = "\n".join(part for _, part in load_template(mode).sections)
    assert text.count("{first}") == text.count("{second}") == text.count("{question}") == 1
    lowered = text.lower()
    assert lowered.count("answer 1") == lowered.count("answer 2")


def test_a_template_is_known_by_its_content(tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("{question} {first} {second}")
    one = load_template("verdict", own).name
    own.write_text("{question} {first} {second}!")
    assert one.startswith("verdict-")
    assert load_template("verdict", own).name != one
