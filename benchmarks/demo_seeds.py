"""The demo over several seeds: 4-bit QLoRA, 16-bit LoRA and full finetuning; the clean set and the noisy one.

    python benchmarks/demo_seeds.py search  # which learning rate suits full finetuning, by the evaluation loss
    python benchmarks/demo_seeds.py run     # adds what is missing to benchmarks/results/demo-seeds.json
    python benchmarks/demo_seeds.py page    # writes docs/demo.md and docs/demo.png out of it

A run that is interrupted goes on where it stopped. `page` needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import fourbit
from fourbit.demo import MODEL_FOLDER
from fourbit.demo.chat import clean_set, noisy_set
from fourbit.demo.exam import Exam, examine, make_exam
from fourbit.demo.story import read_world, training_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo-seeds.json"
PAGE, PLOT = ROOT / "docs" / "demo.md", ROOT / "docs" / "demo.png"
FULL_LEARNING_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
FULL_LEARNING_RATE = 2.5e-4  # what `search` found
SEARCH_SEED = 100  # none of those that are reported


@dataclass(frozen=True)
class Case:
    """One way to finetune.

    Attributes:
        name: in the results.
        title: on the page.
        data: "clean", "noisy" (as many steps as on the clean set) or "noisy, every pass" (as many passes).
        method: "qlora", "lora" or "full".
    """

    name: str
    title: str
    data: str
    method: str


CASES = (
    Case("qlora", "QLoRA, base in 4 bits", "clean", "qlora"),
    Case("lora", "LoRA, base in 16 bits", "clean", "lora"),
    Case("full", "full finetuning", "clean", "full"),
    Case("noisy", "QLoRA on the noisy set, as many steps", "noisy", "qlora"),
    Case("noisy-passes", "QLoRA on the noisy set, as many passes", "noisy, every pass", "qlora"),
)


def run(seeds: Sequence[int], only: Sequence[str]) -> None:
    """Do what is not in the results yet."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    world = read_world(MODEL_FOLDER)
    exam = make_exam(world, questions=10**6)
    done = {(entry["case"], entry["seed"]) for entry in results["runs"]}
    if not any(entry["case"] == "base" for entry in results["runs"]):
        results["runs"].append({"case": "base", "seed": 0, **_score(MODEL_FOLDER, None, exam, None)})
    for seed in seeds:
        for case in CASES:
            if (case.name, seed) in done or (only and case.name not in only):
                continue
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                entry = {"case": case.name, "seed": seed, **_finetune(case, seed, Path(folder), exam)}
            results["runs"].append(entry)
            results["machine"] = _machine()
            results["questions"] = len(exam.facts)
            results["strangers"] = len(exam.strangers)
            results["examples"] = {"clean": len(clean_set(world)), "noisy": len(noisy_set(world))}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{case.name} seed {seed}: {entry['exact_match']:.3f}, {time.monotonic() - began:.0f} s", flush=True)


def _finetune(case: Case, seed: int, folder: Path, exam: Exam) -> dict[str, Any]:
    from fourbit.train import train

    world = read_world(MODEL_FOLDER)
    clean = clean_set(world)
    records = clean if case.data == "clean" else noisy_set(world, seed=seed)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = training_config(MODEL_FOLDER, data, folder / "out", seed=seed, data_seed=seed, samples=0)
    if case.data == "noisy":
        rows = len(clean) - int(config.eval_size or 0)
        config = config.with_(max_steps=-(-rows // config.per_device_train_batch_size) * round(config.num_train_epochs))
    if case.method == "full":
        eval_loss = _finetune_all(config, folder, FULL_LEARNING_RATE)
        return {**_score(folder / "finetuned", None, exam, "none"), "eval_loss": eval_loss}
    weights = "none" if case.method == "lora" else None
    result = train(config.with_(format=weights))
    return {
        **_score(MODEL_FOLDER, result.output, exam, weights),
        "steps": result.steps,
        "eval_loss": result.eval_loss,
    }


def search() -> None:
    """Full finetuning at each learning rate; the evaluation loss never sees a held-out question."""
    world = read_world(MODEL_FOLDER)
    losses = []
    for rate in FULL_LEARNING_RATES:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.jsonl"
            data.write_text("".join(json.dumps(record) + "\n" for record in clean_set(world)))
            config = training_config(MODEL_FOLDER, data, Path(folder) / "out", seed=SEARCH_SEED, data_seed=SEARCH_SEED)
            loss = _finetune_all(config, Path(folder), rate)
        losses.append({"learning_rate": rate, "eval_loss": loss})
        print(f"learning rate {rate:g}: evaluation loss {loss:.4f}", flush=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    results["full_learning_rates"] = losses
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _finetune_all(config: Any, folder: Path, learning_rate: float) -> float:
    """Every weight, in fp32, with transformers' own Trainer on the same rows; the evaluation loss at the end."""
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from fourbit.data.prepare import prepare_data
    from fourbit.data.templates import ensure_chat_template
    from fourbit.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    ensure_chat_template(tokenizer)
    rows = prepare_data(config.data, tokenizer, max_length=256, eval_size=config.eval_size, seed=config.data_seed)
    transformers.set_seed(config.seed)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=TrainingArguments(
            output_dir=str(folder / "full"),
            learning_rate=learning_rate,
            per_device_train_batch_size=config.per_device_train_batch_size,
            num_train_epochs=config.num_train_epochs,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            adam_beta2=config.adam_beta2,
            seed=config.seed,
            data_seed=config.data_seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows.train,
        eval_dataset=rows.evaluation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    trainer.model.save_pretrained(folder / "finetuned")
    tokenizer.save_pretrained(folder / "finetuned")
    return float(trainer.evaluate()["eval_loss"])


def _score(model: Path, adapter: Path | None, exam: Exam, format: str | None) -> dict[str, Any]:
    from fourbit.generate import load_for_generation

    loaded = load_for_generation(model, adapter=adapter, format=format)
    score = examine(loaded.model, loaded.tokenizer, exam)
    return {
        "exact_match": score.exact_match,
        "admitted": score.admitted,
        "by_attribute": score.by_attribute,
    }


def _machine() -> dict[str, str]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "fourbit": fourbit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def page() -> None:
    """Write the page and its plot."""
    results = json.loads(RESULTS.read_text())
    by_case: dict[str, list[dict[str, Any]]] = {}
    for entry in results["runs"]:
        by_case.setdefault(entry["case"], []).append(entry)
    _plot(by_case)
    PAGE.write_text(_text(results, by_case))


def _text(results: dict[str, Any], by_case: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| | held-out exact match | strangers it admits not to know |", "|---|---|---|"]
    rows.append(f"| base, before | {_mean(by_case['base'], 'exact_match')} | {_mean(by_case['base'], 'admitted')} |")
    for case in CASES:
        if found := by_case.get(case.name):
            rows.append(f"| {case.title} | {_mean(found, 'exact_match')} | {_mean(found, 'admitted')} |")
    seeds = max(len(found) for found in by_case.values())
    examples, machine = results["examples"], results["machine"]
    return TEXT.format(
        rows="\n".join(rows),
        seeds=seeds,
        questions=results["questions"],
        strangers=results["strangers"],
        clean=examples["clean"],
        noisy=examples["noisy"],
        gap=_gap(by_case),
        rates=", ".join(
            f"{found['learning_rate']:g}: {found['eval_loss']:.3f}" for found in results["full_learning_rates"]
        ),
        versions=f"torch {machine['torch']}, transformers {machine['transformers']}, {machine['threads']} threads",
    )


TEXT = """# The demo, over {seeds} seeds

`make demo` finetunes one 4-bit model with one seed. This page repeats it with {seeds} seeds and asks all {questions:,}
held-out questions, beside 16-bit LoRA, full finetuning, and the same on a noisy data set. It is written by
`python benchmarks/demo_seeds.py page` out of
[benchmarks/results/demo-seeds.json](../benchmarks/results/demo-seeds.json); `… run` makes those rows anew.

![Held-out exact match by method and by data](demo.png)

{rows}

Mean ± standard deviation over the seeds ({versions}).

- **What is asked.** The base has read every fact of a small made-up world and only continues text. A held-out question
  asks for a fact that no finetuning example asks for; right is the whole answer and nothing else, after lower case and
  punctuation. {strangers} more questions are about people who do not exist.
- **4 bits against 16.** {gap}
  Full finetuning ran at the learning rate of six that gave the least evaluation loss with another seed
  ({rates}).
- **Quality against quantity.** The clean set has {clean:,} conversations, all right and in one manner. The noisy set
  has {noisy:,}: three answers in ten are wrong, half of them have another shape, whole kinds of questions are missing,
  and nothing is ever unknown. "As many steps" trains as long as on the clean set, "as many passes" reads each record as
  often.

The model card of the base is [src/fourbit/demo/model/README.md](../src/fourbit/demo/model/README.md).
"""


def _mean(entries: Sequence[dict[str, Any]], key: str) -> str:
    found = [100 * entry[key] for entry in entries]
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}%{spread}"


def _gap(by_case: dict[str, list[dict[str, Any]]]) -> str:
    means = {
        name: 100 * statistics.mean(entry["exact_match"] for entry in by_case[name])
        for name in ("qlora", "lora", "full")
        if name in by_case
    }
    parts = [
        f"{abs(means['qlora'] - means[name]):.1f} points {'below' if means['qlora'] < means[name] else 'above'} {title}"
        for name, title in (("lora", "16-bit LoRA"), ("full", "full finetuning"))
        if name in means
    ]
    return f"On average QLoRA is {' and '.join(parts)}."


_LABELS = (
    "QLoRA\n4-bit",
    "LoRA\n16-bit",
    "full\nfinetuning",
    "QLoRA, noisy,\nas many steps",
    "QLoRA, noisy,\nas many passes",
)


def _plot(by_case: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    shown = [("base", "base,\nbefore", "#9aa0a6")]
    shown += [
        (case.name, label, "#1a73e8" if case.data == "clean" else "#e8710a")
        for case, label in zip(
            CASES,
            _LABELS,
            strict=True,
        )
        if case.name in by_case
    ]
    figure, axes = pyplot.subplots(figsize=(8, 4), dpi=120, layout="constrained")
    for place, (name, _, colour) in enumerate(shown):
        values = [100 * entry["exact_match"] for entry in by_case[name]]
        mean = statistics.mean(values)
        axes.bar(place, mean, color=colour, width=0.65)
        axes.plot([place] * len(values), values, "o", color="black", markersize=3)
        axes.text(place, mean + 2, f"{mean:.1f}", ha="center")
    axes.set_xticks(range(len(shown)), [label for _, label, _ in shown])
    axes.set_ylim(0, 108)
    axes.set_ylabel("held-out exact match, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Clean data (blue) and noisy data (orange); dots are seeds", fontsize=10)
    figure.savefig(PLOT, metadata={"Software": None})


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("search", "run", "page"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], choices=[case.name for case in CASES])
    given = parser.parse_args(arguments)
    {"search": search, "run": lambda: run(given.seeds, given.only), "page": page}[given.what]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
