"""Every verdict, on data made for it and on real data; and that the counts are those of the trainer's own rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fourbit.data.checks import NOTE, OK, PROBLEM
from fourbit.data.colours import CUT, LOSS
from fourbit.data.encode import IGNORED
from fourbit.data.lint import Lint, lint_data, preview_data
from fourbit.data.page import write_page
from fourbit.data.prepare import prepare_data
from fourbit.data.templates import ensure_chat_template
from fourbit.errors import InputError

Rows = Sequence[dict[str, Any]]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def tokenizer(tokenizer_of: Callable[[str], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    made = tokenizer_of("guanaco")
    made.pad_token = "<unk>"
    return made


def good(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Records that share nothing but their form."""
    spelled = [" ".join(NUMBERS[int(digit)] for digit in f"{n * 7919 + 10007:06}") for n in range(start, start + count)]
    return [{"prompt": f"Spell {n}?", "completion": f"It is {words}."} for n, words in enumerate(spelled, start)]


def chat(*turns: str, **fields: Any) -> dict[str, Any]:
    """A conversation of a user and an assistant by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)], **fields}


def linted(rows: Rows, tokenizer: PreTrainedTokenizerBase, folder: Path, **options: Any) -> Lint:
    (folder / "a.json").write_text(json.dumps(list(rows)))
    return lint_data(str(folder / "a.json"), tokenizer, **{"max_length": 300, "eval_size": 0, **options})


def verdicts(found: Lint) -> dict[str, str]:
    return {check.name: check.verdict for check in found.checks if check.verdict != OK}


def test_good_data(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = linted(good(40), tokenizer, tmp_path, eval_size=5)
    assert verdicts(found) == {}
    assert found.refusal is None
    assert (found.numbers["examples"], found.numbers["eval_examples"]) == (35, 5)


CHAT = [chat("Hi?", "Ho."), chat("Who?", "Me."), chat("Where?", "Here.")]
TOLD = [{"messages": [{"role": "tool", "content": "x"}, *CHAT[0]["messages"]]}]
ENDS = {"prompt": "Is </s> the end?", "completion": "Yes."}
LATE = {"prompt": "Q" * 400, "completion": "A"}
BRIEF = [{"prompt": "Q" * 200 + str(n), "completion": "A"} for n in range(3)]
BAD: list[tuple[str, Rows, dict[str, str], str]] = [
    ("a missing answer", [*good(9), {"prompt": "Q", "completion": ""}], {"records": NOTE}, "without an answer: 1"),
    ("a bad answer", [*good(9), good(1)[0] | {"label": False}], {"records": NOTE}, "`label`"),
    ("a role", [*CHAT, *TOLD], {"chat template": PROBLEM}, "the role tool"),
    ("cut off", [*good(9), {"prompt": "Q", "completion": "A" * 400}], {"length": PROBLEM}, "1 of 10 examples (10.0%)"),
    ("lost", [*good(9), LATE], {"length": PROBLEM, "labels": PROBLEM}, "No label survives in 1"),
    ("an empty turn", [*CHAT, chat("a", "", "b", "c")], {"answers without loss": NOTE}, "as they are empty: 1"),
    ("left open", [*CHAT, chat("Which?", "This.", "And?")], {"last turns": NOTE}, "1 conversations go on"),
    ("tools", [*CHAT, chat("Whom?", "Her.", tools=[{"name": "f"}])], {"tools and thoughts": NOTE}, "`tools`"),
    ("an end in a text", [*good(9), ENDS], {"special tokens": PROBLEM}, "'</s>' in 1"),
    ("a blank", [*good(9), {"prompt": "Why?", "completion": " Why not\n"}], {"white space": NOTE}, "1 answers"),
    ("twice", [*good(20), good(1)[0]], {"duplicates": NOTE}, "1 of 21 examples"),
    ("often", [*good(2), *good(2)], {"duplicates": PROBLEM}, "2 of 4 examples"),
    ("hardly anything", BRIEF, {"loss": NOTE}, "tokens carry loss"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "expected", "says"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_verdicts(
    rows: Rows, expected: dict[str, str], says: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The one that is meant, and no other."""
    found = linted(rows, tokenizer, tmp_path)
    assert verdicts(found) == expected
    check = next(check for check in found.checks if says in check.finding)
    assert check.name in expected
    assert check.advice.endswith(".")
    assert check.name == "loss" or check.where.startswith(f"{tmp_path / 'a.json'}, record ")


def test_leakage(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The same, and one word of thirty changed."""
    long = {"prompt": "Count.", "completion": " ".join(NUMBERS * 3)}
    changed = long | {"completion": long["completion"].removesuffix("ten") + "eleven"}
    (tmp_path / "held.json").write_text(json.dumps([*good(30, 100), good(1)[0], changed]))
    found = linted([*good(9), long], tokenizer, tmp_path, eval_source=str(tmp_path / "held.json"), eval_size=None)
    (check,) = [check for check in found.checks if check.name == "leakage"]
    assert check.verdict == PROBLEM
    assert check.finding.startswith("Of 32 held-out examples 1 are in the training data as well, and 1 are near one")
    assert check.where == f"{tmp_path / 'held.json'}, record 31, record 32"


def test_templates_and_tokenizers(
    tokenizer_of: Callable[[str], PreTrainedTokenizerBase], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    told = [{"messages": [{"role": "system", "content": "Be brief."}, *row["messages"]]} for row in CHAT]
    assert verdicts(linted(told, tokenizer, tmp_path)) == {}
    gemma = tokenizer_of("gemma")
    assert verdicts(linted(told, gemma, tmp_path))["system turns"] == NOTE
    tokenizer.pad_token = tokenizer.eos_token
    assert verdicts(linted(CHAT, tokenizer, tmp_path)) == {"padding": NOTE}
    tokenizer.pad_token = "<unk>"
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = "{{ bos_token }}" + template
    assert verdicts(linted(CHAT, tokenizer, tmp_path)) == {"beginning": PROBLEM}
    tokenizer.chat_template = template.replace("{{ text }}{{ eos_token }}", "{{ text }}.")
    found = linted(CHAT, tokenizer, tmp_path)
    assert "beginning" not in verdicts(found)


def test_an_end_that_no_template_writes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """EOS would have to follow, and the tokenizer knows none."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert verdicts(linted(CHAT, tokenizer, tmp_path)) == {}  # we put EOS behind an answer that nothing ends
    tokenizer.eos_token = None
    assert verdicts(linted(CHAT, tokenizer, tmp_path))["end of turn"] == PROBLEM


def test_the_numbers_are_the_trainers(stories_model: Path, shared_data: Path) -> None:
    """Of real records, many of them cut: examples, tokens, labels, and what is dropped."""
    tokenizer: Any = AutoTokenizer.from_pretrained(stories_model)
    ensure_chat_template(tokenizer)
    for source, length in (("alpaca/alpaca_100.json", 128), ("hh-rlhf/harmless_400.jsonl", 200)):
        for loss_on in ("answers", "all"):
            options = {"max_length": length, "loss_on": loss_on, "limit": 60}
            found = lint_data(str(shared_data / source), tokenizer, **options)  # type: ignore[arg-type]
            rows = prepare_data(str(shared_data / source), tokenizer, **options)  # type: ignore[arg-type]
            labels = [label for row in rows.train["labels"] for label in row[1:]]
            assert found.numbers["examples"] == len(rows.train)
            assert found.numbers["eval_examples"] == len(rows.evaluation or ())
            assert found.numbers["tokens"] == sum(map(len, rows.train["input_ids"]))
            assert found.numbers["labelled_tokens"] == len(labels) - labels.count(IGNORED)
            assert found.numbers["dropped_records"] == rows.dropped
            assert sorted(found.lengths) == sorted(map(len, rows.train["input_ids"]))
            assert sum(count for _, _, count in found.histogram) == 60


def test_what_cannot_be_trained_on(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """In the words of the trainer, whatever the reason."""
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    for rows, length in ((good(3), 5), ([{"messages": [CHAT[0]["messages"][0], called]}], 300), (TOLD, 300)):
        found = linted(rows, tokenizer, tmp_path, max_length=length)
        with pytest.raises(InputError) as refused:
            prepare_data(str(tmp_path / "a.json"), tokenizer, max_length=length)
        assert found.refusal == str(refused.value)
        assert "loss" in verdicts(found)
        assert "This cannot be trained on." in write_page(found, model="m", data="d")


def test_lengths_far_apart(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """One giant does not make a single bar of the rest."""
    found = linted([*good(300), {"prompt": "Q", "completion": "A" * 50_000}], tokenizer, tmp_path)
    assert sum(count for _, _, count in found.histogram) == 301
    assert found.histogram[-1][1:] == (None, 1)
    assert sum(count > 0 for _, _, count in found.histogram) > 2


def test_the_page(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Self-contained, and whatever the data says stays text."""
    evil = {"prompt": "<script>alert(1)</script>", "completion": "<b>no</b> " + "A" * 400}
    found = linted([*good(5), evil], tokenizer, tmp_path, max_length=100)
    page = write_page(found, model="path/to/model", data=str(tmp_path / "a.json"))
    assert "<script>" not in page
    assert "<b>no" not in page
    assert "http" not in page
    assert '<span class="verdict problem">problem</span>' in page
    assert all(f'class="t {kind}"' in page for kind in (LOSS, CUT, "data", "template"))
    assert any(sample.remark == "its answer is cut off in the middle" for sample in found.samples)


def test_a_preview(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(good(10)))
    source = str(tmp_path / "a.json")
    shown = preview_data(source, tokenizer, count=2, max_length=300)
    assert [each.place for each in shown] == [f"{source}, record 1", f"{source}, record 6"]
    assert all(each.count(LOSS) > 0 for each in shown)
    with pytest.raises(InputError, match="at least one record"):
        preview_data(source, tokenizer, count=0, max_length=300)
    tokenizer.chat_template = (
        "{{ raise_exception('No ' ~ messages[0]['content']) if 'ques' not in messages[0]['content'] }}"
    )
    with pytest.raises(InputError, match="refuses every example: No Spell"):
        preview_data(source, tokenizer, count=1, max_length=300)


def test_progress(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    linted(good(150), tokenizer, tmp_path, progress=lambda *each: told.append(each))
    assert [(what, done) for what, done, _ in told] == [
        ("measuring", 0),
        ("measuring", 100),
        ("measuring", 150),
        ("looking for duplicates", 0),
    ]
