"""MMLU beside lm-evaluation-harness, question by question: docs/mmlu.md and the numbers behind it.

    python benchmarks/mmlu_harness.py MMLU MODEL...     measures (half an hour on one core), then writes the page
    python benchmarks/mmlu_harness.py [--check]         writes the page from the stored numbers, or only checks it

Both ask the same model object, in fp32, in bf16 and in NF4, with the harness' own wrapper of transformers models on its
side. Where its answer is another, it is kept how far apart it finds the two letters.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fourbit.bench import environment, rows
from fourbit.evaluate import Exam, Mmlu, Question, measure_mmlu, read_exam
from fourbit.evaluate.questions import LETTERS, render

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mmlu.md"
NUMBERS = ROOT / "benchmarks" / "results" / "mmlu_harness.json"
SPEEDS = ROOT / "benchmarks" / "results" / "mmlu-zen5-2core.csv"
LIFTED = 8192
"""Positions that a model is told to have, so that five examples fit before any question. What it then says is of no
use, but it is the same for both."""
FIVE_SHOT_LIMIT = 2
"""Questions of a subject at five shots, of which the harness reads every example anew."""
HEADING = "The following are multiple choice questions (with answers) about {space}{subject}.\n\n"
WEIGHTS = {
    "fp32": {"format": "none", "dtype": "float32"},
    "NF4, fp32": {"format": "nf4", "dtype": "float32"},
    "bf16": {"format": "none", "dtype": "bfloat16"},
}


INTRODUCTION = """\
`fourbit eval mmlu` asks multiple-choice questions with four answers. `fourbit eval harness` runs the other tasks of
[lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness). Both take a model in 16 or 4 bits, with
an adapter or without.

    fourbit eval mmlu path/to/model --adapter adapter --data mmlu
    fourbit eval mmlu path/to/model --data cais/mmlu --shots 0 --subject anatomy --json
    fourbit eval harness path/to/model --tasks hellaswag,arc_easy --adapter adapter --limit 100

The prompt is that of the original evaluation, worked examples first; the answer is the letter that the model finds
likeliest after "Answer:". `--data` is MMLU's own folder of CSV files (`dev` for the examples, `test` or `val` for the
questions), a file, or a name on the hub. `mmlu` of `fourbit train` asks the same at every evaluation of a run.

What prompts have in common is computed once: the worked examples of a subject, the heading of all. The output head
sees the last place of each prompt only. See [continuations.py](../src/fourbit/evaluate/continuations.py).
"""
OTHER_TASKS = """
## Other tasks

`fourbit eval harness` needs `pip install 'fourbit[harness]'`. Prompts, metrics and names are the harness'; so are
random seeds, cut contexts and what counts as right, and what it writes as `"acc,none"` is `acc` here. Log-likelihoods
are computed as for MMLU, so that choices of a question share its context and questions their examples; generated
answers go through transformers' `generate`. The suite holds every kind of request against the harness' own wrapper of
the same model in 4 bits with an adapter ([test_harness.py](../tests/unit/evaluate/test_harness.py)).

A task of one's own is a YAML file, and `--include-path` its folder; its data may be a local file:

```yaml
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
```

Tasks that run code which the model wrote are refused, and so are those with pictures. Standard errors that have no
formula come from 1,000 resamples; the harness takes 100,000.
"""


def main(arguments: list[str]) -> int:
    """Measure, write or check; returns the exit code."""
    if arguments and arguments != ["--check"]:
        NUMBERS.write_text(json.dumps(measured(arguments[0], arguments[1:]), indent=1) + "\n")
    text = page(json.loads(NUMBERS.read_text()), rows.read(SPEEDS))
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text() == text:
            return 0
        print("docs/mmlu.md is not what the numbers say; run `python benchmarks/mmlu_harness.py`.")
        return 1
    PAGE.write_text(text)
    return 0


def measured(data: str, models: list[str]) -> dict[str, Any]:
    """All comparisons."""
    from fourbit.models.origin import ModelOrigin
    from fourbit.models.tokenizer import load_tokenizer

    exams, found = {0: read_exam(data), 5: read_exam(data, limit=FIVE_SHOT_LIMIT)}, []
    for path in models:
        tokenizer = load_tokenizer(path)
        for weights, settings in WEIGHTS.items():
            model = ModelOrigin(model=path, **settings).load_model()
            own = model.config.max_position_embeddings
            cases = [(0, own, False), (0, LIFTED, False), (5, LIFTED, False)]
            if weights == "fp32":
                cases += [(5, own, False), (0, LIFTED, True), (5, LIFTED, True)]
            for shots, length, stock in cases:
                model.config.max_position_embeddings = length
                compared = compare(model, tokenizer, exams[shots], shots=shots, stock=stock)
                found.append({"model": Path(path).name, "weights": weights, "context": length, **compared})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return {"environment": environment.facts(), "harness": version("lm_eval"), "comparisons": found}


def compare(model: Any, tokenizer: Any, exam: Exam, *, shots: int, stock: bool, batch_size: int = 8) -> dict[str, Any]:
    """Both answers to every question of an exam.

    Args:
        stock: whether the harness asks in its own words, or in ours.

    Returns:
        accuracy and harness_accuracy over subjects, questions, cut (asked of a model too short for the whole prompt),
        differ, differ_whole (where nothing was cut), and widest_gap: the most by which the harness prefers its letter
        to ours where nothing was cut, in nats.
    """
    length = model.config.max_position_embeddings
    ours = measure_mmlu(model, tokenizer, exam, shots=shots, batch_size=batch_size, max_length=length)
    with harness_tasks(exam, shots=shots, stock=stock) as tasks:
        theirs = ask_harness(model, tokenizer, tasks, batch_size=batch_size)
    right = {name: [LETTERS.index(question.answer) for question in found] for name, found in exam.questions.items()}
    chosen = {name: [scores.index(max(scores)) for scores in found] for name, found in theirs.items()}
    cut, gaps = 0, []
    differ = 0
    for name, questions in exam.questions.items():
        for place, question in enumerate(questions):
            prompt = render(question, exam.examples[name][:shots])
            whole = len(tokenizer(f"{prompt} A", verbose=False).input_ids) <= length
            cut += not whole
            scores, answer = theirs[name][place], ours.answers[name][place]
            if answer != chosen[name][place]:
                differ += 1
                gaps += [max(scores) - scores[answer]] if whole else []
    return {
        "shots": shots,
        "stock": stock,
        "questions": ours.questions,
        "accuracy": ours.accuracy,
        "harness_accuracy": Mmlu(chosen, right, shots, 0, 0.0).accuracy,
        "cut": cut,
        "differ": differ,
        "differ_whole": len(gaps),
        "widest_gap": max(gaps, default=0.0),
    }


@contextmanager
def harness_tasks(exam: Exam, *, shots: int, stock: bool = False) -> Iterator[dict[str, Any]]:
    """An exam as tasks of the harness, a subject each: its MMLU template over files of ours.

    Args:
        stock: leave the template as it is. It strips questions and writes one space less before the subject.
    """
    import lm_eval
    import yaml
    from lm_eval.tasks import TaskManager

    path = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default" / "_default_template_yaml"
    template = yaml.safe_load(path.read_text())
    if not stock:
        template["doc_to_text"] = template["doc_to_text"].replace("question.strip()", "question")
    with tempfile.TemporaryDirectory() as folder:
        tasks = []
        for name in exam.questions:
            files = {}
            for split, questions in {"test": exam.questions[name], "dev": exam.examples[name]}.items():
                files[split] = str(Path(folder, f"{name}.{split}.jsonl"))
                Path(files[split]).write_text("".join(json.dumps(_document(question)) + "\n" for question in questions))
            heading = HEADING.format(space="" if stock else " ", subject=name.replace("_", " "))
            task = {"task": name, "description": heading, "dataset_path": "json", "num_fewshot": shots}
            tasks.append({**template, **task, "dataset_kwargs": {"data_files": files, "cache_dir": folder}})
        yield TaskManager(include_defaults=False).load(tasks)


def _document(question: Question) -> dict[str, Any]:
    return {
        "question": question.text,
        "choices": list(question.choices),
        "answer": LETTERS.index(question.answer),
    }


def ask_harness(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], *, batch_size: int
) -> dict[str, list[list[float]]]:
    """Subject -> for each question what the harness' own wrapper finds: the log-likelihoods of the four letters."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # a bar for each subject
        found = evaluator.evaluate(wrapped, tasks, bootstrap_iters=0)["samples"]
    ordered = {name: sorted(samples, key=lambda sample: sample["doc_id"]) for name, samples in found.items()}
    return {
        name: [[reply[0][0] for reply in sample["resps"]] for sample in samples] for name, samples in ordered.items()
    }


def page(numbers: Mapping[str, Any], speeds: list[rows.Row]) -> str:
    """docs/mmlu.md."""
    compared = numbers["comparisons"]
    whole = [one for one in compared if not one["stock"] and one["weights"] != "bf16"]
    rounded = [one for one in compared if one["weights"] == "bf16"]
    stock = [one for one in compared if one["stock"]]
    asked = sum(one["questions"] - one["cut"] for one in whole)
    differing = sum(one["differ_whole"] for one in whole)
    gap = max((one["widest_gap"] for one in rounded), default=0.0)
    return f"""# MMLU, and other tasks

{INTRODUCTION}
## Beside lm-evaluation-harness

The harness (version {numbers["harness"]}) asked the same model object the same prompts, through its own wrapper of
transformers models: its MMLU template over the same files, with the second space that the original prompts have
before the subject, and without its stripping of questions. The questions are the {compared[0]["questions"]:,} of the
validation split, at five shots the first {FIVE_SHOT_LIMIT} of each subject. To "{LIFTED:,}" positions a model was
told that it has so many, so that no prompt is cut; its answers are worth nothing then, and the same to both.

{_table(whole)}

Of {asked:,} questions whose prompts were read whole, in fp32 and in NF4 that computes in fp32, **{differing} were
answered differently**. What differs beyond is explained question by question:

- **Cut prompts.** A prompt that is longer than the model's context loses worked examples here, as in the original
  evaluation, and counts as wrong where even the bare question is too long. The harness cuts tokens off its beginning.
- **bf16.** The harness takes the logarithms of probabilities in bf16, where the four letters are often exactly alike,
  and then the first of them wins; another order of sums changes logits by a unit in the last place, too. Where the
  answers differ, the harness finds the two letters at most {gap:.3f} nats apart:

{_table(rounded)}

- **The harness' own words.** Its template writes one space less before the subject and strips questions, so that
  every prompt is another one:

{_table(stock)}

- **Averages.** `accuracy` is the mean over subjects, as in the paper; the harness' number for the group `mmlu` is the
  mean over questions, which is `question_accuracy` here.

`python benchmarks/mmlu_harness.py MMLU MODEL...` makes these tables anew.

## How fast

{_speeds(speeds)}
{OTHER_TASKS}"""


def _table(compared: list[dict[str, Any]]) -> str:
    """A comparison a line."""
    lines = [
        "| model | weights | shots | positions | questions | fourbit | harness | cut | differ | differ, not cut |",
        f"|{'---|' * 10}",
    ]
    for one in compared:
        cells = [
            one["model"],
            one["weights"],
            one["shots"],
            f"{one['context']:,}",
            f"{one['questions']:,}",
            f"{one['accuracy']:.2%}",
            f"{one['harness_accuracy']:.2%}",
            one["cut"],
            one["differ"],
            one["differ_whole"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _speeds(speeds: list[rows.Row]) -> str:
    """The last run of each case, and how it was made."""
    latest = rows.latest(speeds)
    if not latest:
        return "Not measured yet."
    lines = ["| what | fourbit, questions/s | lm-evaluation-harness | ratio of medians |", "|---|---|---|---|"]
    for case, found in sorted(latest.items()):
        by_name = {one.contender: one for one in found}
        ours, theirs = by_name["fourbit"], by_name["lm-evaluation-harness"]
        shown = [f"{one.median:.2f} ({one.minimum:.2f} to {one.maximum:.2f})" for one in (ours, theirs)]
        lines.append(f"| {case.removeprefix('mmlu ')} | {' | '.join(shown)} | {ours.median / theirs.median:.2f} |")
    one = next(iter(latest.values()))[0]
    machine = f"{one.cpu}, {one.cores} cores, torch {one.torch}, transformers {one.transformers}, {one.libraries}"
    return (
        "\n".join(lines)
        + f"""

{machine}; one process, the same model object and the same batch size for both, in turns; medians of {one.samples}
rounds after one that does not count, and their range. `benchmarks/mmlu_speed.py` measures, and its rows are in
[{SPEEDS.name}](../benchmarks/results/{SPEEDS.name}).

At five shots the harness reads the worked examples with every question, and we read them once for a subject. At no
shots there is next to nothing to share: what is saved are the output head and the softmax at all places but one, and
the tokenizer's work, of which the harness asks for eight times as much. What is left is the product of the layers with
the question, which both have to compute."""
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.manual_seed(0)
    raise SystemExit(main(sys.argv[1:]))
