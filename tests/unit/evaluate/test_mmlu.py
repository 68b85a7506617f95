"""Multiple-choice questions: the prompts, the shared prefix against a forward pass per prompt, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fourbit.errors import InputError
from fourbit.evaluate import Exam, Mmlu, Question, measure_mmlu, read_exam
from fourbit.evaluate.questions import LETTERS, render

WORDS = ["fox", "lazy dog", "a", "quick", "brown", "over the hill", "7", "Märchen"]


def question(number: int, subject: str = "animals") -> Question:
    words = [WORDS[(number * step) % len(WORDS)] + str(number) for step in (1, 3, 5, 7)]
    first, second, third, fourth = words
    return Question(
        subject, "What? " * (1 + number % 3) + str(number), (first, second, third, fourth), "ABCD"[number % 4]
    )


@pytest.fixture
def exam() -> Exam:
    subjects = ("animals", "old_tales")
    return Exam(
        {name: [question(number, name) for number in range(7 + len(name))] for name in subjects},
        {name: [question(100 + number, name) for number in range(5)] for name in subjects},
        "an exam",
    )


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    """With room for five examples, and peft's adapter far from zero."""
    from peft import LoraConfig, get_peft_model

    tiny_llama.config.max_position_embeddings = 2048
    torch.manual_seed(1)
    return get_peft_model(tiny_llama, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).double()


@torch.no_grad()
def brute_force(model: Any, tokenizer: Any, exam: Exam, shots: int) -> dict[str, list[int]]:
    """One forward pass per prompt, from the definition; the byte tokenizer writes " A" as two tokens."""
    model.eval()
    letters = [tokenizer(letter).input_ids[0] for letter in LETTERS]
    found: dict[str, list[int]] = {}
    for name, questions in exam.questions.items():
        for asked in questions:
            ids = tokenizer(render(asked, exam.examples[name][:shots]) + " ").input_ids
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1, letters]
            best, second = scores.topk(2).values
            assert best - second > 1e-9  # far above what the order of sums changes in float64
            found.setdefault(name, []).append(int(scores.argmax()))
    return found


@pytest.mark.parametrize("shots", [0, 1, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_shared_prefix_changes_no_answer(
    shots: int, batch_size: int, model: Any, byte_tokenizer: Any, exam: Exam
) -> None:
    model.train()
    seen: list[tuple[int, int]] = []
    score = measure_mmlu(
        model, byte_tokenizer, exam, shots=shots, batch_size=batch_size, progress=lambda *args: seen.append(args)
    )
    assert model.training  # as it was found
    assert score.answers == brute_force(model, byte_tokenizer, exam, shots)
    assert len({letter for answers in score.answers.values() for letter in answers}) > 1
    assert seen[-1] == (len(exam), len(exam))
    assert (score.questions, score.shots, score.shortened, score.too_long) == (len(exam), shots, 0, 0)


def test_a_prompt_that_is_too_long_loses_examples_and_no_question(model: Any, byte_tokenizer: Any, exam: Exam) -> None:
    asked = exam.questions["animals"]
    lengths = [len(byte_tokenizer(render(each, exam.examples["animals"][:2])).input_ids) + 1 for each in asked]
    only = Exam({"animals": asked}, exam.examples, "an exam")
    score = measure_mmlu(model, byte_tokenizer, only, shots=3, max_length=max(lengths))
    assert score.shortened == len(asked)
    assert score.answers == brute_force(model, byte_tokenizer, only, 2)
    shortest = min(len(byte_tokenizer(render(each, [])).input_ids) + 1 for each in asked)
    score = measure_mmlu(model, byte_tokenizer, only, shots=3, max_length=shortest)
    fitting = sum(len(byte_tokenizer(render(each, [])).input_ids) + 1 <= shortest for each in asked)
    assert score.too_long == len(asked) - fitting > 0
    assert score.accuracy <= fitting / len(asked)


def test_every_subject_counts_the_same() -> None:
    score = Mmlu({"a": [0, 1, 2, 3], "b": [1]}, {"a": [0, 1, 2, 0], "b": [0]}, 0, 0, 1.0)
    assert score.subjects == {"a": 0.75, "b": 0.0}
    assert score.accuracy == 0.375
    assert score.question_accuracy == 0.6
    assert score.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5 / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 6}, "an exam has 5 worked examples of animals, and 6 are to stand before each question"),
        ({"shots": -1}, "-1 shots"),
        ({"batch_size": 0}, "batches of 0"),
        ({"max_length": 4096}, "this model takes 2 to 2048"),
    ],
)
def test_settings_out_of_range(
    settings: dict[str, int], message: str, model: Any, byte_tokenizer: Any, exam: Exam
) -> None:
    with pytest.raises(InputError, match=message):
        measure_mmlu(model, byte_tokenizer, exam, **settings)


def test_letters_that_are_one_token(model: Any, exam: Exam) -> None:
    class Blind:
        eos_token_id = None

        def __call__(self, text: str, **settings: object) -> Any:
            return type("Encoded", (), {"input_ids": [1] * len(text.split())})

    with pytest.raises(InputError, match="not four different texts"):
        measure_mmlu(model, Blind(), exam, shots=0)


@torch.no_grad()
def test_letters_of_several_tokens(model: Any, byte_tokenizer: Any, exam: Exam) -> None:
    """Whose likelihood is that of all their tokens; here B is written by two, and C by three."""

    class Clumsy:
        eos_token_id = None

        def __call__(self, text: Any, **settings: object) -> Any:
            if isinstance(text, list):
                return type("Encoded", (), {"input_ids": [self(each, **settings).input_ids for each in text]})
            ids = byte_tokenizer(text, **settings).input_ids
            tail = {ord("B"): [70, 71], ord("C"): [70, 72, 73]}.get(ord(text[-1]), ids[-1:])
            ids = [*ids[:-1], *tail] if text.startswith("Answer: ") else ids
            return type("Encoded", (), {"input_ids": ids})

    expected: dict[str, list[int]] = {}
    model.eval()
    for name, questions in exam.questions.items():
        for asked in questions:
            ids = byte_tokenizer(render(asked, []) + " ").input_ids
            scores = []
            for letter in LETTERS:
                written = Clumsy()(f"Answer: {letter}").input_ids[len("Answer: ") :]
                logits = model(input_ids=torch.tensor([ids + written])).logits[0].log_softmax(dim=-1)
                scores.append(sum(float(logits[len(ids) - 1 + j, token]) for j, token in enumerate(written)))
            expected.setdefault(name, []).append(max(range(4), key=scores.__getitem__))
    assert measure_mmlu(model, Clumsy(), exam, shots=0, batch_size=3).answers == expected


# Reading


def write_folder(folder: Path, split: str = "test") -> Path:
    for name in ("dev", split):
        (folder / name).mkdir(parents=True)
        rows = [f'"Which, {j}?",one,two,"3, or so",four,{"ABCD"[j % 4]}\n' for j in range(5)]
        (folder / name / f"high_school_art_{name}.csv").write_text("".join(rows))
    return folder


@pytest.mark.parametrize("split", ["test", "val"])
def test_the_folders_of_the_original(split: str, tmp_path: Path) -> None:
    exam = read_exam(str(write_folder(tmp_path / "mmlu", split)))
    assert (len(exam), len(exam.examples["high_school_art"])) == (5, 5)
    assert exam.questions["high_school_art"][2] == Question(
        "high_school_art", "Which, 2?", ("one", "two", "3, or so", "four"), "C"
    )
    assert len(read_exam(str(tmp_path / "mmlu"), limit=2)) == 2


def test_a_prompt_is_that_of_the_original() -> None:
    asked = Question("high_school_art", "Which?", ("1", "2", "3", "4"), "B")
    assert render(asked, [asked]) == (
        "The following are multiple choice questions (with answers) about  high school art.\n\n"
        "Which?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\nWhich?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


def test_the_released_prompts_are_taken_apart_and_come_out_again(shared_data: Path) -> None:
    exam = read_exam(str(shared_data / "mmlu"))
    assert (len(exam), len(exam.questions), len(exam.examples)) == (1531, 57, 57)
    asked = {(each.subject, render(each, []), each.answer) for found in exam.questions.values() for each in found}
    records = map(json.loads, (shared_data / "mmlu" / "zero_shot_mmlu_val.jsonl").read_text().splitlines())
    assert asked == {(record["subject"], record["input"], record["output"]) for record in records}


def test_tables_as_spreadsheets_write_them(tmp_path: Path) -> None:
    """A byte order mark, line breaks and quotes in a cell, empty lines; what is written stays as it is."""
    (tmp_path / "art_test.csv").write_bytes(
        b'\xef\xbb\xbf"Who said ""no""?\nWhen?", a , b,"c, d",,A\r\n\r\nWhich?,1,2,3,4, B \r\n'
    )
    assert read_exam(str(tmp_path / "art_test.csv")).questions == {
        "art": [
            Question("art", 'Who said "no"?\nWhen?', (" a ", " b", "c, d", ""), "A"),
            Question("art", "Which?", ("1", "2", "3", "4"), "B"),
        ]
    }


def test_records_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"subject": "art", "question": "Which?", "choices": ["1", "2", "3", "4"], "answer": 2}))
    assert read_exam(str(path)).questions == {"art": [Question("art", "Which?", ("1", "2", "3", "4"), "C")]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Which?"}', "rows.jsonl, line 1: the record has 'question'; a question has"),
        ('{"question": "Which?", "choices": ["1", "2", "3"], "answer": 0}', "needs its text, four choices"),
        ('{"question": "Which?", "choices": ["1", "2", "3", "4"], "answer": 4}', "needs its text, four choices"),
        ('{"question": "Which?", "choices": ["1", "2", "3", "4"], "answer": true}', "needs its text, four choices"),
        ('{"input": "Which?\\nA. 1\\nB. 2\\nAnswer:", "output": "A"}', "needs its text, four choices"),
        ('{"input": "Which?\\nA. 1\\nB. 2\\nC. 3\\nD. 4\\nAnswer:", "output": ["A"]}', "needs its text, four"),
        ('{"question": null, "choices": ["1", "2", "3", "4"], "answer": 0}', "needs its text, four choices"),
        ('{"question": "Which?", "choices": ["1", "2", "3", null], "answer": 0}', "needs its text, four choices"),
        ('{"question": "Which?", "choices": ["1", "2", "3", "4"], "answer": "b"}', "the letter A, B, C or D"),
        ('{"subject": 7, "question": "Which?", "choices": ["1", "2", "3", "4"], "answer": 0}', "needs its text"),
        ("{", "rows.jsonl, line 1"),
        ("", "holds no"),
    ],
)
def test_broken_records(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=message):
        read_exam(str(path))


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no test/\*\.csv or val/\*\.csv"):
        read_exam(str(tmp_path))
    folder = write_folder(tmp_path / "mmlu")
    with pytest.raises(InputError, match=r"holds no train/\*\.csv"):
        read_exam(str(folder), split="train")
    with pytest.raises(InputError, match="has no subject 'music'; it has high_school_art"):
        read_exam(str(folder), subjects=["music"])
    with pytest.raises(InputError, match="must be 1 or more"):
        read_exam(str(folder), limit=0)
    with pytest.raises(InputError, match="does not exist"):
        read_exam(str(tmp_path / "nothing"))
    (folder / "test" / "high_school_art_test.csv").write_text("Which?,1,2,3,4,B\nWhich?,1,2,3,B\n")
    with pytest.raises(InputError, match=r"high_school_art_test\.csv, line 2: a question needs"):
        read_exam(str(folder))
    (folder / "test" / "high_school_art_test.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no CSV of questions"):
        read_exam(str(folder))
