"""Tasks of lm-evaluation-harness over local files: our scores are its own, in 4 bits and with an adapter."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit
from fourbit.errors import InputError, MissingExtra
from fourbit.evaluate import load_harness_tasks, measure_tasks, read_exam
from fourbit.models.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
THINGS = ["cat", "dog", "ball", "tree", "car", "bird", "girl", "boy", "bear", "house"]
ENDINGS = ["was very happy", "said", "wanted to play with his friends in the park", "big"]

TASKS = {
    "endings": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "greedy": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: acc}, {metric: perplexity}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def harness() -> Any:
    """lm_eval, imported with the warnings of what it stands on."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'fourbit[harness]'")
    from lm_eval import evaluator

    return evaluator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks as YAML files, and the documents that all of them ask of."""
    found = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": f"Once upon a time, there was a {thing}. The {thing}", "choices": ENDINGS, "answer": number % 4}
        for number, thing in enumerate(THINGS)
    ]
    (found / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        head = f"task: own_{name}\ndataset_path: json\ntest_split: test\nfewshot_split: test\n"
        files = f"dataset_kwargs: {{data_files: {{test: {found / 'documents.jsonl'}}}, cache_dir: {found / 'cache'}}}"
        (found / f"{name}.yaml").write_text(head + files + task)
    return found


@pytest.fixture(scope="module")
def model(stories_model: Path) -> Any:
    """The real model in NF4, computing in fp32, with an adapter of noise."""
    from peft import LoraConfig, get_peft_model

    base = fourbit.load(stories_model, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base, config).eval()


@pytest.fixture(scope="module")
def tokenizer(stories_model: Path) -> Any:
    return load_tokenizer(stories_model)


@pytest.fixture
def plain(harness: Any, model: Any, tokenizer: Any) -> Iterator[Any]:
    """The harness' own wrapper around the same model, and its own evaluation."""
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    return lambda tasks: evaluated(harness, wrapped, tasks, bootstrap_iters=1000)


def evaluated(harness: Any, wrapped: Any, tasks: Any, bootstrap_iters: int) -> Any:
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)  # as the harness' own command does
    return harness.evaluate(wrapped, tasks.loaded, bootstrap_iters=bootstrap_iters)["results"]


@pytest.mark.parametrize("shots", [0, 2])
def test_our_scores_are_those_of_the_harness(
    shots: int, folder: Path, model: Any, tokenizer: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourbit.evaluate.continuations.GROUP_TOKENS", 8)  # so that beginnings are shared here
    names = [f"own_{name}" for name in TASKS if shots == 0 or name != "rolling"]
    expected = plain(load_harness_tasks(names, shots=shots, include_path=folder))
    told: list[tuple[int, int]] = []
    tasks = load_harness_tasks(names, shots=shots, include_path=folder)
    assert tasks.names == names
    scores = measure_tasks(model, tokenizer, tasks, batch_size=3, progress=lambda *counts: told.append(counts))
    assert list(scores) == names
    for name, score in scores.items():
        assert (score.shots, score.examples) == (shots, 10)
        assert score.metrics
        for metric, value in score.metrics.items():
            # sums of at most 60 fp32 logarithms, each of logits whose sums of 172 products come in another order
            assert value == pytest.approx(expected[name][f"{metric},none"], rel=1e-4), (name, metric)
    assert scores["own_endings"].standard_errors["acc"] == expected["own_endings"]["acc_stderr,none"]
    assert (50, 50) in told  # ten questions with four endings, and ten more


def test_a_training_model_scores_the_same(folder: Path, stories_model: Path, tokenizer: Any, harness: Any) -> None:
    """`fourbit.prepare` puts other kernels into a model: norms, gated activations, rotary embeddings, attention."""
    tasks = load_harness_tasks(["own_endings", "own_greedy"], include_path=folder)
    before = measure_tasks(fourbit.load(stories_model, dtype=torch.float32), tokenizer, tasks)
    prepared = fourbit.prepare(fourbit.load(stories_model, dtype=torch.float32), gradient_checkpointing=True)
    after = measure_tasks(prepared, tokenizer, tasks)
    for name in tasks.names:
        assert after[name].metrics == pytest.approx(before[name].metrics, rel=1e-4)  # as above


def test_limits_tell(folder: Path, model: Any, tokenizer: Any, harness: Any) -> None:
    tasks = load_harness_tasks(["own_endings"], include_path=folder)
    assert measure_tasks(model, tokenizer, tasks, limit=3)["own_endings"].examples == 3
    for settings, message in [
        ({"limit": 0}, "The limit is 0"),
        ({"batch_size": 0}, "The batch size is 0"),
        ({"max_length": 513}, "this model takes 2 to 512"),
        ({"max_length": 4}, "A continuation of the task has 1[0-9] tokens; this model takes 1 to 4"),
        ({"chat": True}, "no chat template"),
    ]:
        with pytest.raises(InputError, match=message):
            measure_tasks(model, tokenizer, tasks, **settings)


def test_a_long_context_loses_its_beginning_as_in_the_harness(
    folder: Path, model: Any, tokenizer: Any, harness: Any
) -> None:
    from lm_eval.models.huggingface import HFLM

    tasks = load_harness_tasks(["own_endings"], shots=4, include_path=folder)
    cut = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=60)
    expected = evaluated(harness, cut, tasks, 0)["own_endings"]
    found = measure_tasks(model, tokenizer, tasks, max_length=60)["own_endings"].metrics
    assert found == {"acc": expected["acc,none"], "acc_norm": expected["acc_norm,none"]}


def test_what_is_wrong_with_tasks(folder: Path, tmp_path: Path, harness: Any) -> None:
    with pytest.raises(InputError, match="No task is named"):
        load_harness_tasks([])
    with pytest.raises(InputError, match="-1 shots"):
        load_harness_tasks(["own_endings"], shots=-1, include_path=folder)
    with pytest.raises(InputError, match="holds no task"):
        load_harness_tasks(["own_endings"], include_path=tmp_path)
    with pytest.raises(InputError, match="own_endings is asked for twice"):
        load_harness_tasks(["own_endings", "own_endings"], include_path=folder)
    head = "task: broken\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
    for body, message in {
        "dataset_kwargs: {data_files: {test: nowhere.jsonl}}\n": "The task broken cannot be loaded: .*nowhere.jsonl",
        "doc_to_text: !function nothing.ask\n": "The task broken cannot be loaded",
        "unsafe_code: true\n" + files_of(folder): "runs code that the model wrote",
    }.items():
        (tmp_path / "broken.yaml").write_text(head + body)
        with pytest.raises(InputError, match=message):
            load_harness_tasks(["broken"], include_path=tmp_path)


def files_of(folder: Path) -> str:
    task = (folder / "endings.yaml").read_text()
    return "".join(
        f"{line}\n" for line in task.splitlines() if not line.startswith(("task", "dataset_path", "test_", "output"))
    )


def test_names_and_data_that_are_not_to_be_had(
    folder: Path, tmp_path: Path, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far.yaml").write_text("task: far\ndataset_path: nobody/nothing\ntest_split: test\n")
    # in place of the harness' own list, which takes ten seconds to read
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py"))
    with pytest.raises(InputError, match=r"has no task 'own_ending'; did you mean own_endings\?"):
        load_harness_tasks(["own_ending"], include_path=folder)
    with pytest.raises(InputError, match="has no task 'zzz'; `lm_eval ls tasks` lists them all"):
        load_harness_tasks(["zzz"])
    with pytest.raises(InputError, match=r"The data of the task far is not in the local cache .* cannot be reached"):
        load_harness_tasks(["far"])


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fourbit\[harness\]'"):
        load_harness_tasks(["hellaswag"])


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_is_that_of_the_harness(
    shots: int, stories_model: Path, shared_data: Path, tokenizer: Any, harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompts, the same model: the same answer to every question. All of them: docs/mmlu.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    compare = runpy.run_path(str(ROOT / "benchmarks" / "mmlu_harness.py"))["compare"]
    exam = read_exam(str(shared_data / "mmlu"), subjects=["astronomy", "college_physics"], limit=3)
    loaded: Any = fourbit.load(stories_model, dtype=torch.float32)
    loaded.config.max_position_embeddings = 8192  # room for five examples
    found = compare(loaded, tokenizer, exam, shots=shots, stock=False)
    assert (found["questions"], found["cut"], found["differ"]) == (6, 0, 0)
    assert found["accuracy"] == found["harness_accuracy"]
