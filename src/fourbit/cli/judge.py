"""`fourbit judge ANSWERS ANSWERS... --output FILE`: a language model as the judge of answers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import output
from fourbit.cli.errors import Interrupted
from fourbit.errors import InputError
from fourbit.words import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.evaluate.judge.job import Job, Judged
    from fourbit.evaluate.judge.money import Budget, Estimate

__all__ = ["announce", "explain", "judge"]


def judge(
    context: typer.Context,
    answers: Annotated[
        list[str],
        typer.Argument(
            metavar="ANSWERS...",
            help="Two or more files of `fourbit generate`, one for each system, as FILE or NAME=FILE.",
        ),
    ],
    out: Annotated[Path, typer.Option("--output", help="The ratings to write, one JSON record for each judgement.")],
    model: Annotated[str, typer.Option(help="The judge, by its name at the endpoint.")],
    mode: Annotated[
        str, typer.Option(help="verdict: which of two answers is better, or a tie; scores: 0 to 10 for each.")
    ] = "verdict",
    reference: Annotated[
        str | None,
        typer.Option(help="Compare each system with this one, by its name or file. Default: all with all."),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible API, such as http://localhost:8000/v1. Default: OpenAI's."),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The environment variable with the key. Default: OPENAI_API_KEY for OpenAI; none for another URL.",
        ),
    ] = None,
    prompt: Annotated[
        Path | None,
        typer.Option(help="A text file to ask with in place of ours; {question}, {first}, {second} are filled in."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The prompts, for answers that do not hold them: a file, vicuna, or openassistant."
        ),
    ] = None,
    common: Annotated[bool, typer.Option("--common", help="Judge only the prompts that all systems answer.")] = False,
    temperature: Annotated[float, typer.Option(help="Of the judge.")] = 0.2,
    max_tokens: Annotated[int, typer.Option(help="The most tokens of a reply.")] = 1024,
    seed: Annotated[int | None, typer.Option(help="Of the judge, for servers that take one.")] = None,
    concurrency: Annotated[int, typer.Option(help="Questions at a time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds that a reply may take.")] = 120.0,
    patience: Annotated[
        float, typer.Option(help="Seconds that a question may go on failing before the run ends.")
    ] = 600.0,
    backoff: Annotated[
        float, typer.Option(help="Seconds to wait after a first failure; doubled after each one more.")
    ] = 1.0,
    price_in: Annotated[float | None, typer.Option(help="The price of a million tokens of prompt.")] = None,
    price_out: Annotated[float | None, typer.Option(help="The price of a million tokens of reply.")] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Never spend more than this on these ratings, earlier runs included.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where replies are kept. Default: OUTPUT.cache.sqlite.")] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Write the ratings that can be had where some cannot.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace ratings that this command would not make again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask nothing; only say what it would cost.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Let a language model judge pairs of answers, in both orders.

    Every reply is kept as soon as it is there: after an interruption the same command asks only for what is missing,
    and no reply is paid for twice. The estimate takes four bytes of text for a token.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate.judge.asking import Pace
        from fourbit.evaluate.judge.endpoint import Address
        from fourbit.evaluate.judge.job import Job
        from fourbit.evaluate.judge.money import Prices
        from fourbit.evaluate.judge.requests import Settings

        job = Job.plan(
            answers,
            out,
            settings=Settings(model, temperature, max_tokens, seed),
            mode=mode,
            reference=reference,
            prompt=prompt,
            questions=questions,
            common=common,
            prices=Prices(price_in, price_out),
            max_cost=max_cost,
            cache=cache,
            overwrite=overwrite,
        )
        pace = Pace(concurrency, backoff, patience, timeout)
        known, forecast, budget = job.look(concurrency)
        keys = _plan_keys(job, len(known), forecast, budget)
        if dry_run:
            show(keys | {"dry_run": True}, lambda: output.facts(f"{out} would be", _plan_facts(job, forecast, keys)))
            return
        address = Address.find(base_url, api_key_env)
        announce(job, forecast)
        with output.progress() as progress:
            judged = job.run(address, pace=pace, partial=partial, progress=progress, say=_say)
        explain(job, judged, shlex.join(("fourbit", *context.obj)))
        keys = _keys(job, judged)
        show(keys, lambda: _table(job, keys))


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def announce(job: Job, forecast: Estimate) -> None:
    """Say what is to come, and what it will cost."""
    for sentence in (*job.sentences, _forecast_sentence(job, forecast)):
        _say(sentence)


def explain(job: Job, judged: Judged, command: str) -> None:
    """Say why judgements are missing.

    Raises:
        Interrupted, InputError: no ratings were written.
    """
    asked, total = judged.asked, len(job.requests)
    kept = f"{len(judged.judgements):,} of {total:,} judgements are kept in {job.cache}" if judged.judgements else ""
    if asked.interrupted:
        raise Interrupted(f"Stopped; {kept or 'no judgement was made'}. To go on: {command}")
    why = asked.stopped
    if asked.capped:
        why = (
            f"The next judgement could pass the cap of {job.max_cost:,.2f}, as {judged.budget.committed:,.4f} may have"
            " been spent already; raise --max-cost to go on"
        )
    refusals = list(asked.refused.values())
    if judged.written:
        for sentence in (f"{why}." if why else "", f"{len(refusals)} refused; {refusals[0]}." if refusals else ""):
            if sentence:
                _say(sentence)
        return
    if judged.missing:
        rest = f"; {kept}, and the same command asks only for the rest" if kept else ""
        raise InputError(f"{why or refusals[0]}{rest}.")


def _plan_keys(job: Job, known: int, forecast: Estimate, budget: Budget) -> dict[str, Any]:
    return {
        "output": str(job.output),
        "cache": str(job.cache),
        "judge": job.settings.judge,
        "mode": job.mode,
        "systems": [system.name for system in job.systems],
        "reference": job.reference,
        "prompts": job.prompts,
        "judgements": len(job.requests),
        "to_ask": forecast.requests,
        "estimate": {
            "prompt_tokens": forecast.prompt_tokens,
            "completion_tokens": forecast.completion_tokens,
            "most_completion_tokens": forecast.most_completion_tokens,
            "cost": forecast.cost,
            "most_cost": forecast.most_cost,
            "seconds": forecast.seconds,
        },
        "already": known,
        "cost": budget.spent if job.prices.known else None,
        "uncertain_cost": budget.uncertain if job.prices.known else None,
    }


def _plan_facts(job: Job, forecast: Estimate, keys: dict[str, Any]) -> dict[str, str]:
    template = job.requests[0]
    return {
        "judge": f"{keys['judge']}, {keys['mode']}",
        "systems": ", ".join(keys["systems"]) + (f"; each against {job.reference}" if job.reference else ""),
        "judgements": f"{keys['judgements']:,}: {keys['prompts']:,} prompts in both orders",
        "to ask": f"{forecast.requests:,}" + (f"; {keys['already']:,} are in {job.cache}" if keys["already"] else ""),
        "estimate": _forecast(forecast),
        "the first, rendered": "\n\n".join(message["content"] for message in template.messages),
    }


def _forecast(forecast: Estimate) -> str:
    said = (
        f"about {forecast.prompt_tokens:,} tokens in and {forecast.completion_tokens:,} out (at most"
        f" {forecast.most_completion_tokens:,})"
    )
    if forecast.cost is not None and forecast.most_cost is not None:
        said += f", {forecast.cost:,.2f} (at most {forecast.most_cost:,.2f})"
    return f"{said}, {duration(forecast.seconds)}"


def _forecast_sentence(job: Job, forecast: Estimate) -> str:
    if not forecast.requests:
        return f"All {len(job.requests):,} judgements are in {job.cache}; nothing is asked."
    return f"To ask: {forecast.requests:,} of {len(job.requests):,} judgements, {_forecast(forecast)}."


def _keys(job: Job, judged: Judged) -> dict[str, Any]:
    from fourbit.evaluate.judge.summary import summarize

    budget, asked = judged.budget, judged.asked
    return {
        "output": str(job.output),
        "cache": str(job.cache),
        "judge": job.settings.judge,
        "mode": job.mode,
        "systems": [system.name for system in job.systems],
        "reference": job.reference,
        "prompts": job.prompts,
        "judgements": len(judged.judgements),
        "missing": judged.missing,
        "asked": asked.answered,
        "retries": asked.retries,
        "prompt_tokens": budget.prompt_tokens,
        "completion_tokens": budget.completion_tokens,
        "cost": budget.spent if job.prices.known else None,
        "uncertain_cost": budget.uncertain if job.prices.known else None,
        "seconds": asked.seconds,
        **summarize(judged.judgements, mode=job.mode),
        "dry_run": False,
    }


def _facts(job: Job, keys: dict[str, Any]) -> dict[str, str]:
    kept = keys["judgements"] - keys["asked"]
    rows = {
        "judge": f"{keys['judge']}, {keys['mode']}",
        "judgements": f"{keys['judgements']:,} on {keys['prompts']:,} prompts, both orders"
        + (f"; {kept:,} known before" if kept > 0 else ""),
    }
    if keys["missing"]:
        rows["missing"] = f"{keys['missing']:,}"
    rows["unparsed"] = f"{keys['unparsed']:.1%} of the replies"
    if bias := keys["order_bias"]:
        rows["shown first"] = (
            f"takes {bias['first_share']:.1%} of the points ({bias['low']:.1%} to {bias['high']:.1%}); 50% without bias"
        )
        if bias["compared"]:
            rows["order flips"] = f"{bias['flipped']:.1%} of the verdicts, {bias['reversed']:.1%} from win to loss"
    tokens = f"{keys['prompt_tokens']:,} tokens in, {keys['completion_tokens']:,} out"
    if keys["cost"] is not None:
        tokens = f"{keys['cost']:,.4f}; {tokens}"
        if keys["uncertain_cost"]:
            tokens += f"; up to {keys['uncertain_cost']:,.4f} more for replies that were lost on the way"
    rows["cost"] = tokens
    if keys["asked"]:
        again = f", {keys['retries']:,} tries more" if keys["retries"] else ""
        rows["time"] = f"{duration(keys['seconds'])}, {keys['asked'] / max(keys['seconds'], 1e-9):,.1f}/s{again}"
    return rows


def _table(job: Job, keys: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    scored = keys["mode"] == "scores"
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold", min_width=16)
    shares = ("scores", f"of {job.reference}'s") if scored else ("share of points", "at equal length")
    for name in ("wins", "ties", "losses", *shares):
        table.add_column(name, justify="right", no_wrap=name in ("wins", "ties", "losses"))
    for pair in keys["pairs"]:
        columns = _score_columns(pair) if scored else _share_columns(pair)
        name = pair["first"] if job.reference else f"{pair['first']} against {pair['second']}"
        table.add_row(Text(name, style="cyan"), *_counts(pair), *columns[0])
        for title, order, shown in zip(("  shown first", "  shown second"), pair["orders"], columns[1:], strict=True):
            table.add_row(Text(title, style="dim"), *_counts(order), *shown, style="dim")
    return Group(
        output.facts(str(job.output), _facts(job, keys)),
        Padding(table, (0, 0, 0, 2), expand=False),
        Text(_legend(job, scored), style="dim"),
    )


def _counts(found: dict[str, Any]) -> list[str]:
    return [f"{found[name]:,}" for name in ("wins", "ties", "losses")]


def _share_columns(pair: dict[str, Any]) -> list[tuple[str, str]]:
    controlled = pair["length_controlled"]
    total = (_interval(pair), "" if controlled is None else _interval(controlled))
    return [total, *((_points(order), "") for order in pair["orders"])]


def _score_columns(pair: dict[str, Any]) -> list[tuple[str, str]]:
    scores = pair["scores"]
    if scores is None:
        return [("", "")] * 3
    total = (
        f"{scores['first_mean']:.2f} : {scores['second_mean']:.2f}",
        _interval({**scores, "share": scores["share_of_second"]}),
    )
    return [total, ("", _percent(scores["shown_first"])), ("", _percent(scores["shown_second"]))]


def _points(order: dict[str, Any]) -> str:
    played = order["wins"] + order["ties"] + order["losses"]
    return f"{(order['wins'] + order['ties'] / 2) / played:.1%}" if played else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _interval(found: dict[str, Any]) -> str:
    if found["share"] is None:
        return ""
    return f"{found['share']:.1%} ({100 * found['low']:.1f}–{100 * found['high']:.1f})"


def _legend(job: Job, scored: bool) -> str:
    against = f" against {job.reference}" if job.reference else ""
    what = "the system's score sum as a share of the reference's" if scored else "a tie is half a point"
    return f"\n  Of each system{against}: {what}; in brackets 95% over prompts.\n"
