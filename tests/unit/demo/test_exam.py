"""The exam counts whole answers, and facts apart from strangers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fourbit.demo.exam import examine, make_exam
from fourbit.demo.world import make_world


def test_an_exam_has_facts_and_a_quarter_as_many_strangers() -> None:
    exam = make_exam(make_world(), questions=40)
    assert (len(exam.facts), len(exam.strangers)) == (40, 10)
    assert {question.attribute for question in exam.strangers} == {"unknown"}


def test_a_score_is_the_share_of_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    exam = make_exam(make_world(), questions=40)
    questions = [*exam.facts, *exam.strangers]

    def answer(model: Any, tokenizer: Any, prompts: list[Any], **arguments: Any) -> list[Any]:
        assert [prompt[0]["content"] for prompt in prompts] == [question.prompt for question in questions]
        right_ones = {*range(30), *range(40, 45)}
        return [
            SimpleNamespace(text=question.answer if place in right_ones else f"{question.answer} And so on.")
            for place, question in enumerate(questions)
        ]

    monkeypatch.setattr("fourbit.generate.generate", answer)
    score = examine(None, None, exam)
    assert score.exact_match == 0.75
    assert score.admitted == 0.5
    total = sum(
        share * sum(question.attribute == name for question in exam.facts) for name, share in score.by_attribute.items()
    )
    assert total == pytest.approx(30)
    assert len(score.answers) == 50


def test_a_base_that_knows_nothing_scores_nothing(tiny_base: Path) -> None:
    from fourbit.generate import load_for_generation

    loaded = load_for_generation(tiny_base)
    told: list[tuple[int, int]] = []
    exam = make_exam(make_world(people=12), questions=8)
    score = examine(loaded.model, loaded.tokenizer, exam, progress=lambda done, total: told.append((done, total)))
    assert score.exact_match == 0
    assert told[-1] == (10, 10)
