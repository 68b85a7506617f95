"""Ratings of every kind, and what is wrong with those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourbit.errors import InputError
from fourbit.evaluate import read_ratings


def written(folder: Path, name: str, *records: Any) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


def review(one: str, other: str, score: Any, question: int = 1) -> dict[str, Any]:
    return {"question_id": question, "answer1_id": one, "answer2_id": other, "score": score, "text": "..."}


def test_our_own(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "judged.jsonl",
        {"id": 7, "first": "a", "second": "b", "label": 1, "judge": "j", "order": 1},
        {"id": "x", "first": "b", "second": "a", "label": -1, "scores": None, "judge": "j"},
        {"id": "x", "first": "b", "second": "a", "scores": [8, 9.5]},
    )
    one, two, three = read_ratings(path)
    assert (one.first, one.second, one.label, one.prompt, one.rater) == ("a", "b", 1, "7", "j")
    assert (two.label, two.scores) == (-1, None)
    assert (three.label, three.scores, three.place) == (2, (8.0, 9.5), f"{path}, line 3")


def test_fastchats_pairs_are_two_matches(tmp_path: Path) -> None:
    record = {"question_id": 81, "model_1": "a", "model_2": "b", "judge": ["gpt-4", "pair-v2"], "turn": 1}
    path = written(
        tmp_path,
        "gpt-4_pair.jsonl",
        record | {"g1_winner": "model_1", "g2_winner": "model_2"},
        record | {"g1_winner": "tie", "g2_winner": "error"},
    )
    found = [(one.first, one.second, one.label) for one in read_ratings(path)]
    # in the second game the second model's answer is shown first; the winner is named all the same
    assert found == [("a", "b", 1), ("b", "a", 1), ("a", "b", 3), ("b", "a", -1)]
    assert {(one.rater, one.prompt, one.turn) for one in read_ratings(path)} == {("gpt-4", "81", "1")}


@pytest.mark.parametrize(
    ("winner", "label"),
    [
        ("model_a", 1),
        ("model_b", 2),
        ("A", 1),
        ("left", None),
        ("llama", 1),
        ("tie (bothbad)", 3),
        ("tie", 3),
        ("", -1),
    ],
)
def test_votes(tmp_path: Path, winner: str, label: int | None) -> None:
    path = written(tmp_path, "votes.csv", f"model_a,model_b,winner,judge\nllama,vicuna,{winner},ann\n")
    if label is None:
        with pytest.raises(InputError, match=r"votes\.csv, row 1: the winner is 'left', which is neither"):
            read_ratings(path)
        return
    (found,) = read_ratings(path)
    assert (found.first, found.second, found.label, found.rater) == ("llama", "vicuna", label, "ann")


def test_a_model_called_like_the_other_column(tmp_path: Path) -> None:
    """A name wins over a column: the model `b` is shown first here."""
    (found,) = read_ratings(written(tmp_path, "votes.csv", "model_a,model_b,winner\nb,a,b\n"))
    assert found.label == 1


def test_systems_of_the_file_name(tmp_path: Path) -> None:
    name = "answer-gpt35-vs-7b-guanaco-vicuna-generations-topp0.9-temp0.7-gpt-4-reviewer-threeclass.jsonl"
    (found,) = read_ratings(written(tmp_path, name, review("x", "y", 3)))
    assert (found.first, found.second, found.label) == ("gpt35", "7b-guanaco", 3)


def test_ids_win_over_the_name(tmp_path: Path) -> None:
    """b's file against a has the presentation the other way round; the file against c tells whose the ids are."""
    written(tmp_path, "a-vs-b.jsonl", review("b1", "a1", 1), review("b2", "a2", 2, 2))
    written(tmp_path, "a-vs-c.jsonl", review("a1", "c1", 1), review("a2", "c2", 1, 2))
    found = [(one.first, one.second, one.label) for one in read_ratings(tmp_path)]
    assert found == [("b", "a", 1), ("b", "a", 2), ("a", "c", 1), ("a", "c", 1)]


def test_equal_answers_share_an_id(tmp_path: Path) -> None:
    """b and c both said "z": its files name a twice, and yet it is not a's."""
    for name, own in (("b", "z"), ("c", "z"), ("d", "d1")):
        written(tmp_path, f"a-vs-{name}.jsonl", review("a1", own, 1))
    assert [(one.first, one.second) for one in read_ratings(tmp_path)] == [("a", "b"), ("a", "c"), ("a", "d")]


def test_answers_tell_whose_ids_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ratings = written(tmp_path, "ratings/gpt-3.5-vs-tiny.jsonl", review("t1", "g1", 1))
    answers = written(tmp_path, "answers/x.jsonl", {"answer_id": "g1", "model_id": "gpt-3.5-turbo:20230327"})
    (guessed,) = read_ratings(ratings)
    assert (guessed.first, guessed.second) == ("gpt-3.5", "tiny")
    assert "1 of 1 ratings name their systems" in caplog.text
    caplog.clear()
    (told,) = read_ratings(ratings, answers=[answers])
    assert (told.first, told.second) == ("tiny", "gpt-3.5")
    assert caplog.text == ""


def test_ids_of_other_systems(tmp_path: Path) -> None:
    for other in "bcdef":
        written(tmp_path, f"a-vs-{other}.jsonl", review("a1", f"{other}1", 1))
    written(tmp_path, "x-vs-y.jsonl", review("a1", "y1", 1))
    with pytest.raises(InputError, match=r"x-vs-y\.jsonl: its answer ids are not those of the systems in its name"):
        read_ratings(tmp_path)


def test_new_names(tmp_path: Path) -> None:
    path = written(tmp_path, "v.csv", "model_a,model_b,winner\na,b,a\n")
    (found,) = read_ratings(path, names={"a": "Anna"})
    assert (found.first, found.second, found.label) == ("Anna", "b", 1)
    with pytest.raises(InputError, match="No rating speaks of 'c'; the systems are a, b"):
        read_ratings(path, names={"c": "Carl"})
    with pytest.raises(InputError, match="Two systems would have the same name"):
        read_ratings(path, names={"a": "b"})


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("r.jsonl", '{"first": "a", "second": "b", "label": 1}\n{"first": "a", "sec', r"r\.jsonl, line 2 is not valid"),
        ("r.jsonl", '{"first": "a", "second": "b", "label": 4}', "line 1: the label is '4'; it must be 1, 2, 3"),
        ("r.jsonl", '{"first": "a", "second": "b", "label": true}', "line 1: the label is 'True'"),
        ("r.jsonl", '{"first": "a", "second": "b", "label": [1]}', "line 1: the label is"),
        ("r.jsonl", '{"first": "a", "second": "b"}', "line 1 has no label"),
        ("r.jsonl", '{"first": "a", "second": "a", "label": 1}', "line 1 compares 'a' with itself"),
        ("r.jsonl", '{"first": "a", "second": 5, "label": 1}', "line 1: second is '5'; it must be the name"),
        ("r.jsonl", '{"first": "a", "second": " ", "label": 1}', "line 1: second is ' '"),
        ("r.jsonl", '{"first": "a", "second": "b", "label": 1, "id": {}}', "line 1: the id is {}"),
        ("r.jsonl", '{"first": "a", "second": "b", "scores": [1]}', "line 1: the scores are"),
        ("r.jsonl", '{"first": "a", "second": "b", "scores": [1, NaN]}', "line 1: the scores are"),
        ("r.jsonl", '{"first": "a", "second": "b", "scores": [1, -4]}', "only -1, -1"),
        ("r.jsonl", '{"question_id": 1, "model": "a", "score": 9}', "line 1 scores one answer alone"),
        ("r.jsonl", '{"text": "hello"}', "line 1 is no rating; it needs first, second and label.* has text"),
        ("r.jsonl", '{"answer1_id": "x", "answer2_id": "y", "score": 1}', r"call it ONE-vs-OTHER\.jsonl"),
        ("a-vs-b.jsonl", '{"answer1_id": "x", "answer2_id": "y"}', "the label is 'None'"),
        ("r.jsonl", '{"model_1": "a", "model_2": "b"}', "has no g1_winner"),
        ("r.csv", "model_a,model_b\na,b\n", "row 1 has no winner"),
        ("r.jsonl", "[1, 2]\n", "a record must be a JSON object"),
        ("r.jsonl", "", "holds no records"),
        ("r.txt", "hello", "is of no kind that can be read"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        read_ratings(written(tmp_path, name, text))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_missing_and_repeated_files(tmp_path: Path) -> None:
    path = written(tmp_path, "in/v.csv", "model_a,model_b,winner\na,b,a\n")
    with pytest.raises(InputError, match="does not exist"):
        read_ratings(tmp_path / "nothing")
    with pytest.raises(InputError, match="given twice"):
        read_ratings([path, path.parent])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file to read"):
        read_ratings(tmp_path / "empty")
