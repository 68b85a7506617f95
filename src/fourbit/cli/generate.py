"""`fourbit generate MODEL --prompts FILE --output FILE`: answers to a file of prompts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import options, output
from fourbit.words import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.generate import Loaded
    from fourbit.generate.job import Job, Made

__all__ = ["generate"]


def generate(
    model: options.Model,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="A file of records with messages, turns, prompt or text, and id, question_id or message_id; a dataset"
            " of the hub; or vicuna or openassistant, the prompts of the QLoRA paper.",
        ),
    ],
    out: Annotated[Path, typer.Option("--output", help="The file to write, one JSON record per line.")],
    adapter: options.Adapter = None,
    mode: Annotated[
        str,
        typer.Option(
            help="chat: every prompt or text is what a user says; text: it is continued; auto: a text without a"
            " question_id or message_id is continued, all else is what a user says."
        ),
    ] = "auto",
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw only from the likeliest tokens that together reach this probability.")
    ] = 1.0,
    top_k: options.TopK = 0,
    seed: Annotated[int, typer.Option(help="Of the draw, together with each record's id.")] = 0,
    stop: options.Stop = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    format: options.Format = None,
    block_size: options.BlockSize = None,
    double_quant: options.DoubleQuant = None,
    dtype: options.Dtype = None,
    chat_template: options.ChatTemplate = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew, in place of a file that fourbit wrote before.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; only say what is to be done.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Answer a file of prompts.

    Each record becomes {id, prompt, text, tokens, finish_reason}. Answers are on the disk after each batch: after an
    interruption the same command makes the rest. They depend neither on that nor on the batch size.
    """
    with output.result(as_json) as show:
        from fourbit.generate import Origin, Sampling
        from fourbit.generate.job import Job

        settings = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=tuple(stop or ()),
        )
        origin = Origin(
            model=model,
            adapter=adapter,
            format=format,
            block_size=block_size,
            double_quant=double_quant,
            dtype=dtype,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        job = Job.plan(
            origin,
            prompts,
            out,
            settings=settings,
            batch_size=batch_size,
            mode=mode,
            system=system,
            overwrite=overwrite,
        )
        loaded = None if dry_run else job.load()
        for sentence in job.sentences:  # not before what can go wrong has gone well: an error is one sentence
            print(sentence, file=sys.stderr)
        made = None if dry_run else _run(job, loaded)
        keys = _keys(job, made) | {"model": model, "adapter": adapter}
        show(keys, _table(job, keys, made))


def _run(job: Job, loaded: Loaded | None) -> Made:
    try:
        with output.progress() as progress:
            return job.run(loaded, progress=_with_rate(progress))
    except KeyboardInterrupt:
        path = job.file.path
        if path.exists() and (done := path.read_bytes().count(b"\n")):
            answered = f"{done} of {len(job.prompts)} prompts are answered in {path}"
            print(f"{answered}; the same command makes the rest.", file=sys.stderr)
        raise


def _with_rate(progress: output.Progress) -> Callable[[int, int, float], None]:
    return lambda done, total, rate: progress(f"generating, {rate:,.0f} tokens/s", done, total)


def _keys(job: Job, made: Made | None) -> dict[str, Any]:
    from fourbit.models.process import peak_resident_bytes

    lengths = [len(prompt.ids) for prompt in job.prompts]
    answered, tokens, seconds = (0, 0, 0.0) if made is None else made
    return {
        "output": str(job.file.path),
        "prompts": len(lengths),
        "answered": answered,
        "already": len(job.file.done) - answered,
        "too_long": job.too_long,
        "prompt_tokens": sum(lengths),
        "longest_prompt": max(lengths),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if tokens else 0.0,
        "peak_rss_bytes": peak_resident_bytes(),
        "dry_run": made is None,
    }


def _table(job: Job, keys: dict[str, Any], made: Made | None) -> Callable[[], RenderableType]:
    rows = {"prompts": f"{keys['prompts']:,}, of {keys['longest_prompt']:,} tokens at most"}
    if keys["already"]:
        rows["answered before"] = f"{keys['already']:,}"
    if made is None:
        rows["to be answered"] = f"{keys['prompts'] - keys['already']:,}"
        rows["the first, rendered"] = job.prompts[0].text
        return lambda: output.facts(f"{keys['output']} would be", rows)
    rows["answered"] = f"{keys['answered']:,}, with {keys['tokens']:,} tokens"
    rows["time"] = f"{keys['seconds']:.1f} s, {keys['tokens_per_second']:,.0f} tokens/s"
    rows["peak memory"] = size(keys["peak_rss_bytes"])
    return lambda: output.facts(keys["output"], rows)
