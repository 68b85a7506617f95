"""`fourbit compare FOLDER --prompts SOURCE --output FOLDER`: from a folder of models to a ranking and a page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import judge as judging
from fourbit.cli import options, output
from fourbit.cli.errors import Interrupted
from fourbit.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.evaluate.compare.job import Comparison
    from fourbit.evaluate.judge.job import Judged

__all__ = ["compare"]


def compare(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Holds what is compared: a sub-folder for each model or adapter, and files of answers of others.",
        ),
    ],
    prompts: Annotated[
        str, typer.Option(metavar="SOURCE", help="A file of prompts, a dataset of the hub, vicuna or openassistant.")
    ],
    out: Annotated[Path, typer.Option("--output", help="The folder for answers, ratings, ranking.json and the page.")],
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Compare the models, too, that the adapters were made for.")
    ] = False,
    judge_model: Annotated[
        str | None, typer.Option(help="The judge, by its name at the endpoint. Default: nobody judges.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Of the judge: an OpenAI-compatible API. Default: OpenAI's.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable with the judge's key.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="verdict: which of two answers is better, or a tie; scores: 0 to 10 for each.")
    ] = "verdict",
    reference: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare each system with this one. Default: all with all.")
    ] = None,
    judge_prompt: Annotated[
        Path | None, typer.Option(help="A text file to ask the judge with in place of ours.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Questions to the judge at a time.")] = 8,
    price_in: Annotated[float | None, typer.Option(help="The price of a million tokens of prompt.")] = None,
    price_out: Annotated[float | None, typer.Option(help="The price of a million tokens of reply.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Never spend more than this, earlier runs included.")] = None,
    ratings: Annotated[
        list[str] | None,
        typer.Option(help="Votes of people between these systems, as `fourbit arena` exports them; may be repeated."),
    ] = None,
    common: Annotated[bool, typer.Option("--common", help="Compare only on the prompts that all answer.")] = False,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.7,
    top_p: Annotated[
        float, typer.Option(help="Draw only from the likeliest tokens that together reach this probability.")
    ] = 0.9,
    seed: Annotated[int, typer.Option(help="Of the draw, together with each record's id.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    format: options.Format = None,
    dtype: options.Dtype = None,
    chat_template: options.ChatTemplate = None,
    trust_remote_code: options.TrustRemoteCode = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make anew what was made with other settings.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write and ask nothing; only say what is to be done.")
    ] = False,
    as_json: output.AsJson = False,
) -> None:
    """Compare a folder of models: answers, judge, ranking, report.

    Each model answers the prompts in turn, a judge compares all pairs of answers in both orders, and report.html shows
    the ranking with its intervals and the answers side by side. After an interruption the same command goes on.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate.compare.job import Comparison, Jury, Weights
        from fourbit.evaluate.judge.asking import Pace
        from fourbit.evaluate.judge.endpoint import Address
        from fourbit.evaluate.judge.money import Prices
        from fourbit.evaluate.judge.requests import Settings
        from fourbit.generate import Sampling

        if judge_model is None and (
            mode != "verdict"
            or any(
                given is not None
                for given in (reference, judge_prompt, price_in, price_out, max_cost, base_url, api_key_env)
            )
        ):
            raise InputError("Nobody judges; name a judge with --judge-model, or leave the options for one out.")
        jury = (
            None
            if judge_model is None
            else Jury(Settings(judge_model), mode, reference, judge_prompt, Prices(price_in, price_out), max_cost)
        )
        comparison = Comparison.plan(
            folder,
            prompts,
            out,
            sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed),
            weights=Weights(format, dtype, chat_template, trust_remote_code),
            batch_size=batch_size,
            system=system,
            with_base=with_base,
            jury=jury,
            votes=ratings or (),
            common=common,
            overwrite=overwrite,
        )
        keys = _plan_keys(comparison)
        if dry_run:
            show(keys | {"dry_run": True}, lambda: _plan_table(comparison, keys))
            return
        pace = Pace(concurrency)
        address = None if jury is None else Address.find(base_url, api_key_env)
        for sentence in comparison.sentences:
            _say(sentence)
        command = shlex.join(("fourbit", *context.obj))
        _answer(comparison, command)
        judged = None
        job = comparison.judging()
        if job is not None and address is not None:
            _, forecast, _ = job.look(concurrency)
            judging.announce(job, forecast)
            with output.progress() as progress:
                judged = job.run(address, pace=pace, progress=progress, say=_say)
            judging.explain(job, judged, command)
        with output.progress() as progress:
            record = comparison.conclude(judged, progress=progress)
        keys |= {"rankings": record["rankings"], "notes": record["notes"], "dry_run": False}
        show(keys, lambda: _table(comparison, record, judged))


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _answer(comparison: Comparison, command: str) -> None:
    try:
        with output.progress() as progress:
            comparison.answer(progress)
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped; what is answered is kept in {comparison.output / 'answers'}. To go on: {command}"
        ) from None


def _plan_keys(comparison: Comparison) -> dict[str, Any]:
    return {
        "output": str(comparison.output),
        "report": str(comparison.output / "report.html"),
        "systems": [one.name for one in comparison.contenders],
        "prompts": comparison.prompts,
        "to_answer": comparison.to_answer,
        "judge": None if comparison.jury is None else comparison.jury.settings.judge,
        "judgements": comparison.judgements,
    }


def _plan_table(comparison: Comparison, keys: dict[str, Any]) -> RenderableType:
    missing = comparison.to_answer
    facts = {
        one.name: one.what + (f"; {missing[one.name]:,} prompts to answer" if one.name in missing else "")
        for one in comparison.contenders
    }
    facts["prompts"] = f"{comparison.prompts:,} of {comparison.source}"
    if comparison.jury is not None:
        facts["judge"] = f"{keys['judge']}, {comparison.jury.mode}: {keys['judgements']:,} judgements, both orders"
    else:
        facts["judge"] = "nobody; --judge-model names one"
    if comparison.votes:
        count = sum(map(len, comparison.votes.values()))
        facts["people"] = f"{count:,} votes of {', '.join(comparison.votes)}"
    from rich.console import Group

    return Group(output.facts(f"{comparison.output} would hold", facts), output.sentences(comparison.sentences))


def _table(comparison: Comparison, record: dict[str, Any], judged: Judged | None) -> RenderableType:
    from rich.console import Group

    parts = []
    for name, ranking in record["rankings"].items():
        numbers = {row["model"]: str(place) for place, row in enumerate(ranking["ratings"], start=1)}
        rows = [
            [
                numbers[row["model"]],
                row["model"],
                f"{row['elo']:.0f}",
                f"{row['low']:.0f} – {row['high']:.0f}",
                ", ".join(numbers[other] for other in row["cannot_be_told_apart_from"]),
            ]
            for row in ranking["ratings"]
        ]
        columns = ["#", "system", "Elo", "95% interval", "cannot be told apart from #"]
        title = f"Ranking by {name}: {ranking['matches']:,} judgements on {ranking['prompts']:,} prompts"
        parts.append(output.rows(title, columns, rows, left={"system", "cannot be told apart from #"}))
    said = list(record["notes"][len(comparison.sentences) :])
    if judged is not None and judged.budget.prices.known:
        said.append(f"The judge has cost {judged.budget.spent:,.4f}.")
    if not record["rankings"]:
        said.append("Nobody has judged; --judge-model names a judge, --ratings brings votes of `fourbit arena`.")
    return Group(*parts, output.sentences([*said, f"Look at {comparison.output / 'report.html'}"]))
