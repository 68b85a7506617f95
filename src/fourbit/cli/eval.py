"""`fourbit eval ...`: scores of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import options, output
from fourbit.words import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.evaluate import Mmlu, Perplexity, TaskScore

__all__ = ["app", "harness", "mmlu", "perplexity"]

app = typer.Typer(help="Score a model.")


@app.callback()
def _eval() -> None:
    pass


@app.command()
def perplexity(
    model: options.Model,
    text: Annotated[Path, typer.Option(help="What to score: plain text, .jsonl, .json or .parquet.")],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on the model.")] = None,
    format: options.Format = None,
    block_size: options.BlockSize = None,
    double_quant: options.DoubleQuant = None,
    dtype: Annotated[str, typer.Option(help="What is computed in: float32, bfloat16 or float16.")] = "bfloat16",
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: what the model was made for, 2048 at most.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next. Default: the sequence length, so that none overlap."),
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option(help="Score the first so many tokens only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    separator: Annotated[
        str | None, typer.Option(help="Where plain text is split into documents. Default: the file is one document.")
    ] = None,
    field: Annotated[str, typer.Option(help="The field of a record that holds its text.")] = "text",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: output.AsJson = False,
) -> None:
    """Score how well a model predicts a text.

    Each document is scored alone, after the BOS token, each token once. The perplexity is per token of the model's own
    tokenizer; bits per byte compare models with different ones.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate import measure_perplexity, read_documents
        from fourbit.models.origin import ModelOrigin
        from fourbit.models.tokenizer import load_tokenizer

        documents = read_documents(text, separator=separator, field=field)
        if limit_tokens is None:
            documents = iter(list(documents))  # a bad record shall not come to light after the model was loaded
        origin = ModelOrigin(
            model=model,
            adapter=adapter,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, revision=revision)
        loaded = origin.load_model()
        with output.progress() as progress:
            score = measure_perplexity(
                loaded,
                tokenizer,
                documents,
                sequence_length=sequence_length,
                stride=stride,
                limit_tokens=limit_tokens,
                batch_size=batch_size,
                progress=_with_rate(progress),
            )
        keys = _keys(score) | origin.weights(loaded) | {"model": model, "adapter": adapter, "text": str(text)}
        show(keys, lambda: output.facts(f"{model} on {text.name}", _facts(keys)))


@app.command()
def mmlu(
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(help="MMLU's folder (dev/*.csv, and test/*.csv or val/*.csv), a .jsonl file, or cais/mmlu."),
    ],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on the model.")] = None,
    shots: Annotated[int, typer.Option(help="Worked examples before each question; 0 for none.")] = 5,
    split: Annotated[str | None, typer.Option(help="The questions to ask. Default: test, or val without it.")] = None,
    subject: Annotated[list[str] | None, typer.Option(help="Ask these subjects only; may be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(help="Ask the first so many questions of each subject.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions in one forward pass.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a prompt. Default: what the model was made for, 2048 at most.")
    ] = None,
    format: options.Format = None,
    block_size: options.BlockSize = None,
    double_quant: options.DoubleQuant = None,
    dtype: Annotated[str, typer.Option(help="What is computed in: float32, bfloat16 or float16.")] = "bfloat16",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: output.AsJson = False,
) -> None:
    """Score how many multiple-choice questions a model answers right.

    As in the original evaluation the answer is the letter that is likeliest after "Answer:", and the score is the mean
    over subjects. A prompt that is too long loses worked examples, never a part of its question.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate import measure_mmlu, read_exam
        from fourbit.models.origin import ModelOrigin
        from fourbit.models.tokenizer import load_tokenizer

        exam = read_exam(data, split=split, subjects=subject or (), limit=limit)
        origin = ModelOrigin(
            model=model,
            adapter=adapter,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, revision=revision)
        loaded = origin.load_model()
        with output.progress() as progress:
            score = measure_mmlu(
                loaded,
                tokenizer,
                exam,
                shots=shots,
                batch_size=batch_size,
                max_length=max_length,
                progress=_with_rate(progress, "questions"),
            )
        keys = _mmlu_keys(score) | origin.weights(loaded) | {"model": model, "adapter": adapter, "data": data}
        show(keys, lambda: output.facts(f"{model} on {data}", _mmlu_facts(keys)))


@app.command()
def harness(
    model: options.Model,
    tasks: Annotated[
        list[str], typer.Option(metavar="NAMES", help="Tasks, groups or tags, with commas between; may be repeated.")
    ],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on the model.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Worked examples before each question. Default: what the task says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask the first so many examples of each task.")] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="A folder with tasks of your own, as the harness' YAML; Python that they name is run."),
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the tokenizer's chat template.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens that the model reads at most. Default: what it was made for.")
    ] = None,
    format: options.Format = None,
    block_size: options.BlockSize = None,
    double_quant: options.DoubleQuant = None,
    dtype: Annotated[str, typer.Option(help="What is computed in: float32, bfloat16 or float16.")] = "bfloat16",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: output.AsJson = False,
) -> None:
    """Score a model on any task of lm-evaluation-harness.

    The task, its prompts and its metrics are the harness'; the model runs in 4 bits with its adapter.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate import load_harness_tasks, measure_tasks
        from fourbit.models.origin import ModelOrigin
        from fourbit.models.tokenizer import load_tokenizer

        origin = ModelOrigin(
            model=model,
            adapter=adapter,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        origin.folder()  # a wrong name shall not come to light after data was fetched
        names = [name.strip() for given in tasks for name in given.split(",") if name.strip()]
        found = load_harness_tasks(names, shots=shots, include_path=include_path)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code, revision=revision)
        loaded = origin.load_model()
        started = time.monotonic()
        with output.progress() as progress:
            scores = measure_tasks(
                loaded,
                tokenizer,
                found,
                limit=limit,
                batch_size=batch_size,
                max_length=max_length,
                chat=apply_chat_template,
                progress=_with_rate(progress, "requests"),
            )
        keys = {
            "tasks": {name: asdict(score) for name, score in scores.items()},
            "seconds": time.monotonic() - started,
            **origin.weights(loaded),
            "model": model,
            "adapter": adapter,
        }
        show(keys, lambda: _task_rows(model, scores))


def _task_rows(model: str, scores: Mapping[str, TaskScore]) -> RenderableType:
    cells = []
    for name, score in scores.items():
        for metric, value in score.metrics.items():
            error = score.standard_errors.get(metric)
            cells.append(
                [
                    name,
                    metric,
                    "-" if value is None else f"{value:.4f}",
                    "" if error is None else f"{error:.4f}",
                    "" if score.shots is None else str(score.shots),
                    f"{score.examples:,}",
                ]
            )
    return output.rows(model, ["task", "metric", "score", "±", "shots", "examples"], cells, left=("task", "metric"))


def _mmlu_keys(score: Mmlu) -> dict[str, Any]:
    return {
        "accuracy": score.accuracy,
        "question_accuracy": score.question_accuracy,
        "standard_error": score.standard_error,
        "subjects": score.subjects,
        "questions": score.questions,
        "shots": score.shots,
        "shortened": score.shortened,
        "too_long": score.too_long,
        "seconds": score.seconds,
    }


def _mmlu_facts(keys: dict[str, Any]) -> dict[str, str]:
    ranked = sorted(keys["subjects"].items(), key=lambda item: -item[1])
    rows = {
        "accuracy": f"{keys['accuracy']:.2%} ± {keys['standard_error']:.2%}; 25% by chance",
        "over questions": f"{keys['question_accuracy']:.2%}, as lm-evaluation-harness counts",
        "questions": f"{keys['questions']:,} of {len(ranked)} subjects, {keys['shots']} shots",
    }
    if keys["shortened"]:
        rows["fewer shots"] = f"{keys['shortened']:,} questions, as more would not fit"
    if keys["too_long"]:
        rows["too long"] = f"{keys['too_long']:,} questions, counted as wrong"
    if len(ranked) > 1:
        rows["best"] = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in ranked[:3])
        rows["worst"] = ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in ranked[-3:])
    rows["weights"] = _weights(keys)
    rows["time"] = f"{keys['seconds']:.1f} s, {keys['questions'] / max(keys['seconds'], 1e-9):,.1f} questions/s"
    return rows


def _weights(keys: dict[str, Any]) -> str:
    if keys["block_size"] is None:
        return f"{keys['dtype']}, not quantized"
    scales = " with double quantization" if keys["double_quant"] else ""
    return f"{keys['format'].upper()}, blocks of {keys['block_size']}{scales}, computed in {keys['dtype']}"


def _with_rate(progress: output.Progress, what: str = "tokens") -> Callable[[int, int], None]:
    """Progress, with how many of what are done in a second."""
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - started, 1e-9)
        progress(f"scoring, {rate:,.0f} {what}/s", done, total)

    return show


def _keys(score: Perplexity) -> dict[str, Any]:
    from fourbit.models.process import peak_resident_bytes

    return {
        "perplexity": score.perplexity,
        "tokens": score.tokens,
        "bits_per_byte": score.bits_per_byte,
        "bytes": score.bytes,
        "documents": len(score.losses),
        "sequence_length": score.sequence_length,
        "stride": score.stride,
        "seconds": score.seconds,
        "tokens_per_second": score.tokens / score.seconds,
        "peak_rss_bytes": peak_resident_bytes(),
    }


def _facts(keys: dict[str, Any]) -> dict[str, str]:
    return {
        "perplexity": f"{keys['perplexity']:.4f}",
        "bits per byte": f"{keys['bits_per_byte']:.4f}",
        "tokens": f"{keys['tokens']:,}, for {size(keys['bytes'])} of text",
        "documents": f"{keys['documents']:,}",
        "weights": _weights(keys),
        "windows": f"{keys['sequence_length']} tokens, {keys['stride']} from one to the next",
        "time": f"{keys['seconds']:.1f} s, {keys['tokens_per_second']:,.0f} tokens/s",
        "peak memory": size(keys["peak_rss_bytes"]),
    }
