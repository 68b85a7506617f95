"""From a file to rows for a trainer."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from fourbit.data.prepare import prepare_data
from fourbit.errors import InputError


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return tokenizer_of("guanaco")


def data(path: Path, count: int, *, answer: str = "Answer") -> str:
    rows = [{"prompt": f"Question {n}?", "completion": f"{answer} {n}."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(rows: object, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode([label for label in row["labels"] if label >= 0]) for row in rows]  # type: ignore[attr-defined]


def test_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    prepared = prepare_data(data(tmp_path / "a.jsonl", 3), tokenizer, max_length=200)
    assert prepared.evaluation is None  # too few to hold any out
    assert answers(prepared.train, tokenizer) == [" Answer 0.</s>", " Answer 1.</s>", " Answer 2.</s>"]
    assert set(prepared.train.column_names) == {"input_ids", "labels", "place"}
    assert prepared.dropped == 0


def test_a_part_is_held_out(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = data(tmp_path / "a.jsonl", 100)
    first, again = (prepare_data(source, tokenizer, max_length=200) for _ in range(2))
    assert first.evaluation is not None
    assert (len(first.train), len(first.evaluation)) == (95, 5)
    assert first.evaluation["input_ids"] == again.evaluation["input_ids"]  # type: ignore[index]
    assert not set(answers(first.train, tokenizer)) & set(answers(first.evaluation, tokenizer))
    other = prepare_data(source, tokenizer, max_length=200, seed=1)
    assert other.evaluation["input_ids"] != first.evaluation["input_ids"]  # type: ignore[index]
    assert prepare_data(source, tokenizer, max_length=200, eval_size=0).evaluation is None
    for size, count in ((7, 7), (0.25, 25)):
        assert len(prepare_data(source, tokenizer, max_length=200, eval_size=size).evaluation or ()) == count


def test_what_the_source_holds_out_itself(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data(tmp_path / "train.jsonl", 40)
    data(tmp_path / "test.jsonl", 1030, answer="Other")
    for size, count in ((None, 1024), (7, 7), (0.1, 103), (5000, 1030)):
        prepared = prepare_data(str(tmp_path), tokenizer, max_length=200, eval_size=size)
        assert (len(prepared.train), len(prepared.evaluation or ())) == (40, count)
    assert prepare_data(str(tmp_path), tokenizer, max_length=200, eval_size=0).evaluation is None


def test_evaluation_data_without_a_label(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source, long = data(tmp_path / "a.jsonl", 3), data(tmp_path / "b.jsonl", 2)
    Path(long).write_text(Path(long).read_text().replace("Question", "Q" * 500))
    with pytest.raises(InputError, match=r"b\.jsonl: no label survives: in 2 of 2"):
        prepare_data(source, tokenizer, max_length=200, eval_source=long)
    (tmp_path / "folder").mkdir()
    Path(source).rename(tmp_path / "folder" / "train.jsonl")
    Path(long).rename(tmp_path / "folder" / "test.jsonl")
    prepared = prepare_data(str(tmp_path / "folder"), tokenizer, max_length=200)
    assert (len(prepared.train), prepared.evaluation, prepared.dropped) == (3, None, 2)
    assert prepared.sentences[-1] == "There is no evaluation, as nothing is left of what was held out."
    (tmp_path / "c.json").write_text(json.dumps([{"prompt": "Q", "completion": ""}]))
    with pytest.raises(InputError, match=r"c\.json: every one of the 1 records has an empty answer"):
        prepare_data(str(tmp_path / "folder"), tokenizer, max_length=200, eval_source=str(tmp_path / "c.json"))


def test_a_record_is_on_one_side(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The instances of a record share its instruction."""
    rows = [
        {"instruction": f"Task {n}.", "instances": [{"input": f"{n}", "output": f"Answer {n}."}] * (1 + n % 3)}
        for n in range(30)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepared = prepare_data(str(tmp_path / "a.json"), tokenizer, max_length=200, eval_size=15)
    assert prepared.evaluation is not None
    assert (len(prepared.train), len(prepared.evaluation)) == (45, 15)
    assert not set(answers(prepared.train, tokenizer)) & set(answers(prepared.evaluation, tokenizer))


def test_other_data_to_evaluate_on(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    train, held = data(tmp_path / "a.jsonl", 40), data(tmp_path / "b.jsonl", 2, answer="Other")
    prepared = prepare_data(train, tokenizer, max_length=200, eval_source=held)
    assert prepared.evaluation is not None
    assert len(prepared.train) == 40
    assert answers(prepared.evaluation, tokenizer) == [" Other 0.</s>", " Other 1.</s>"]


def test_what_is_lost_is_said(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q" * 500, "completion": "A"},
        {"prompt": "Q", "completion": "A" * 500},
        {"prompt": "Q", "completion": ""},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    prepared = prepare_data(str(path), tokenizer, max_length=100)
    assert (len(prepared.train), prepared.dropped) == (2, 2)
    assert prepared.sentences == (
        "Recognised prompts with completions by `prompt` and `completion`: 4 records, 3 examples."
        " Left out, without an answer: 1.",
        "Cut off at 100 tokens: 2 of 3 examples.",
        "Left out, as their whole answer was cut off: 1 of 3 examples.",
    )


def test_a_book_is_learned_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """In pieces that end with a line; a part of them is held out, as the book is the only record."""
    book = tmp_path / "book.txt"
    book.write_text("".join(f"It was line {number} of the book, and 中文.\n" for number in range(200)))
    prepared = prepare_data(str(book), tokenizer, max_length=100)
    assert prepared.evaluation is not None
    rows = [*prepared.train, *prepared.evaluation]
    assert all(20 < len(row["input_ids"]) <= 100 for row in rows)
    lines = Counter(line for row in rows for line in tokenizer.decode(row["labels"]).replace("</s>", "").splitlines())
    assert lines == Counter(book.read_text().splitlines())
    assert [row["labels"][-1] == tokenizer.eos_token_id for row in rows].count(True) == 1
    assert prepared.sentences[0] == "Recognised plain text: 1 documents, all of whose tokens are learned."
    assert "continued in further examples: 1 of 1 texts" in prepared.sentences[1]
    (tmp_path / "long.txt").write_text("x" * 5000)
    prepared = prepare_data(str(tmp_path / "long.txt"), tokenizer, max_length=100, eval_size=0)
    assert "".join(tokenizer.decode(row["labels"]) for row in prepared.train) == "x" * 5000 + "</s>"


def test_what_the_template_has_no_place_for(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    told = {"role": "tool", "content": "sunny"}
    rows = [
        {"messages": [asked, said]},
        {"messages": [asked, called | {"content": "Ho"}], "tools": [{"name": "f"}]},
        {"messages": [asked, called]},
        {"messages": [asked, called, told, said]},
        {"messages": [asked, said | {"weight": 0}]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepared = prepare_data(str(tmp_path / "a.json"), tokenizer, max_length=200)
    assert answers(prepared.train, tokenizer) == [" Ho</s>", " Ho</s>"]
    assert prepared.dropped == 3
    assert prepared.sentences[1:] == (
        "Left out, as nothing of their answers is in the template's text: 1 of 4 examples.",
        "Left out, as the chat template refuses them (the role tool is not known here): 1 of 4 examples.",
        "Ignored, as the chat template has no place for it: `tool_calls` in 2 of 4 examples.",
        "Ignored, as the chat template has no place for it: `tools` in 1 of 4 examples.",
    )
    (tmp_path / "a.json").write_text(json.dumps(rows[2:3]))
    with pytest.raises(InputError, match=r"in 1 of 1 examples the chat template leaves the whole answer out"):
        prepare_data(str(tmp_path / "a.json"), tokenizer, max_length=200)
    (tmp_path / "a.json").write_text(json.dumps(rows[4:]))
    with pytest.raises(InputError, match=r"all 1 records are left out, as they ask for no loss on any .* 1\."):
        prepare_data(str(tmp_path / "a.json"), tokenizer, max_length=200)


def test_nothing_to_learn(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    source = data(tmp_path / "a.jsonl", 3)
    with pytest.raises(InputError, match=r"no label survives: in 3 of 3 examples .* which is 5 tokens; give more"):
        prepare_data(source, tokenizer, max_length=5)
    with pytest.raises(InputError, match="no label survives"):  # a first token is never predicted
        prepare_data(source, tokenizer, max_length=1, loss_on="all")
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "Q", "completion": ""}]))
    with pytest.raises(InputError, match="every one of the 1 records has an empty answer"):
        prepare_data(str(tmp_path / "b.json"), tokenizer, max_length=100)
    tokenizer.chat_template = (
        "{{ raise_exception('No ' ~ messages[0]['content']) if 'ques' not in messages[0]['content'] }}"
    )
    with pytest.raises(InputError, match="refuses every example: No Question 0"):
        prepare_data(source, tokenizer, max_length=100)


@pytest.mark.parametrize("size", [3, 5, -1, 1.5, math.nan, math.inf])
def test_parts_that_make_no_sense(size: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_size"):
        prepare_data(data(tmp_path / "a.jsonl", 3), tokenizer, max_length=100, eval_size=size)
