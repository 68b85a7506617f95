"""Questions a second of `fourbit eval mmlu` and of lm-evaluation-harness, on the same model in the same process.

    python benchmarks/mmlu_speed.py MMLU [--text TEXT | --model MODEL] [--rounds N] [--batch-size N] [--save]

With --text the model is a LLaMA of 135.5 M random parameters with 32,000 words, the vocabulary learnt from that file (a
MB or more of plain English): what a question costs depends on how long it is and not on what the model knows. A folder
is told that it has 8,192 positions, so that no prompt is cut. A round is both contenders once, in turns and in changing
order, from questions in memory to answers: prompts, tokens, the model, scores. Loading is in neither time. The harness
runs as it comes, its logits cache on.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmlu_harness import LIFTED, SPEEDS, harness_tasks

from fourbit.bench import environment, rows
from fourbit.evaluate import Exam, measure_mmlu, read_exam

SUBJECTS = ("virology", "high_school_microeconomics", "philosophy")
"""78 questions: about as many to a subject as in the whole validation split, and as long."""
OURS, HARNESS = "fourbit", "lm-evaluation-harness"


def main(arguments: list[str]) -> int:
    """Measure and print; append rows with --save. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mmlu")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path)
    source.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shots", default="0,5")
    parser.add_argument("--weights", default="bf16", choices=["bf16", "NF4"])
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args(arguments)
    exam = read_exam(given.mmlu, subjects=SUBJECTS)
    name, model, tokenizer = contested(given)
    facts = environment.facts() | {"libraries": f"lm_eval {version('lm_eval')}"}
    for shots in map(int, given.shots.split(",")):
        with harness_tasks(exam, shots=shots) as tasks:
            contenders = {
                OURS: ours_of(model, tokenizer, exam, shots, given.batch_size),
                HARNESS: harness_of(model, tokenizer, tasks, given.batch_size),
            }
            seconds, found, others = in_turns(contenders, given.rounds)
        case = f"mmlu {shots}-shot, {name}, {given.weights}, batches of {given.batch_size}"
        measured = [row(facts, case, name, len(exam), seconds[name], found[name], others) for name in contenders]
        ratios = [theirs / ours for ours, theirs in zip(seconds[OURS], seconds[HARNESS], strict=True)]
        for one in measured:
            print(f"{case}: {one.contender:22} {one.median:8.2f} questions/s ({one.minimum:.2f} to {one.maximum:.2f})")
        print(f"{case}: {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
        if given.save:
            rows.append(SPEEDS, measured)
    return 0


def contested(given: argparse.Namespace) -> tuple[str, Any, Any]:
    """The model that both ask: what to call it, itself, and its tokenizer."""
    if given.model is None:
        return "LLaMA of 135 M", made_model(given.weights), learnt_tokenizer(given.text)
    from fourbit.models.origin import ModelOrigin
    from fourbit.models.tokenizer import load_tokenizer

    model = ModelOrigin(
        model=given.model, format={"NF4": "nf4"}.get(given.weights, "none"), dtype="bfloat16"
    ).load_model()
    model.config.max_position_embeddings = LIFTED
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"LLaMA of {parameters / 1e6:.1f} M", model, load_tokenizer(given.model)


def learnt_tokenizer(text: Path) -> Any:
    """Byte-level BPE of up to 32,000 tokens with `<s>` before each text, as LLaMA's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train([str(text)], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def made_model(weights: str) -> Any:
    """A LLaMA of 135.5 M parameters, in bf16 or with its layers in NF4."""
    import fourbit
    from fourbit.models.shapes import random_model

    config = fourbit.QuantConfig(compute_dtype=torch.bfloat16) if weights == "NF4" else None
    return random_model("llama-135m", config, dtype=torch.bfloat16).eval()


def ours_of(model: Any, tokenizer: Any, exam: Exam, shots: int, batch_size: int) -> Callable[[], float]:
    """`measure_mmlu`, as a call that returns the share of right answers."""
    return lambda: measure_mmlu(model, tokenizer, exam, shots=shots, batch_size=batch_size).question_accuracy


def harness_of(model: Any, tokenizer: Any, tasks: Any, batch_size: int) -> Callable[[], float]:
    """The harness' evaluation of loaded tasks, as a call that returns the share of right answers."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def run() -> float:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            found = evaluator.evaluate(wrapped, tasks, bootstrap_iters=0, log_samples=False)
        counts = {name: each["effective"] for name, each in found["n-samples"].items()}
        return sum(found["results"][name]["acc,none"] * count for name, count in counts.items()) / sum(counts.values())

    return run


def in_turns(
    contenders: dict[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float], float | None]:
    """Seconds of every round after a first that does not count, what came out, and what others took of the machine."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    found: dict[str, float] = {}
    disturbance = environment.Disturbance()
    for number in range(rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            found[name] = contenders[name]()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds, found, disturbance.share()


def row(
    facts: dict[str, Any],
    case: str,
    name: str,
    questions: int,
    seconds: list[float],
    check: float,
    others: float | None,
) -> rows.Row:
    """One contender in one case; the process is the same for both, so it has no memory of its own to tell."""
    rates = [questions / one for one in seconds]
    return rows.Row(
        **facts,
        level="",
        case=case,
        contender=name,
        unit="questions/s",
        median=statistics.median(rates),
        minimum=min(rates),
        maximum=max(rates),
        samples=len(rates),
        rounds=1,
        share=None,
        share_of="",
        ready_rss_bytes=0,
        peak_rss_bytes=0,
        check=check,
        others=others,
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    raise SystemExit(main(sys.argv[1:]))
