"""`fourbit agreement`: whether raters, judges and benchmarks say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import options, output
from fourbit.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.evaluate.agreement import Agreement, Estimate, PairAgreement, RaterReport

__all__ = ["agreement"]


def agreement(
    ratings: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RATINGS...",
            help="Files or folders of ratings. NAME= says who rated; else the records' judge does, or the file's name.",
        ),
    ],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FILE", help="Scores of the models to compare with: model, score; may be repeated."
        ),
    ] = None,
    majority: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B,...", help="A further rater: what most of these say; may be repeated."),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATER=MODEL", help="The model that a rater is. Default: the one whose name is part of the rater's."
        ),
    ] = None,
    name: options.Names = None,
    answers: options.Answers = None,
    samples: options.Samples = 1000,
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
    as_json: output.AsJson = False,
) -> None:
    """Measure how far raters agree, with each other and themselves.

    On single answers: Fleiss' and Cohen's kappa of three verdicts (one model, the other, a tie), where both orders of a
    pair are one verdict. On the order of the models: Kendall's tau and Spearman's rho between their ratings. Of a judge
    alone: how often its verdict changes with the order of the answers, and what it gives its own. All with 95%
    bootstrap intervals over prompts.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate.agreement import measure_agreement
        from fourbit.evaluate.raters import read_benchmark, read_raters

        sources = [options.named(given) for given in ratings]
        found = read_raters(sources, answers=answers or (), names=options.assignments(name, "--name"))
        scores: dict[str, dict[str, float]] = {}
        for given in benchmark or ():
            for key, values in read_benchmark(*options.named(given)).items():
                if key in scores:
                    raise InputError(f"Two benchmarks are called {key}; give one as NAME=FILE.")
                scores[key] = values
        measured = measure_agreement(
            found,
            benchmarks=scores,
            majorities={key: value.split(",") for key, value in options.assignments(majority, "--majority").items()},
            selves=options.assignments(own, "--own"),
            samples=samples,
            seed=seed,
        )
        show(_keys(measured), lambda: _tables(measured))


def _keys(measured: Agreement) -> dict[str, Any]:
    return asdict(measured)


def _tables(measured: Agreement) -> RenderableType:
    from rich.console import Group

    parts = []
    if measured.pairs:
        columns = ["between", "and", "same verdict", "Cohen κ", "Kendall τ", "Spearman ρ"]
        rows = [_pair_row(pair) for pair in measured.pairs]
        parts.append(output.rows("Agreement", columns, rows, left={"between", "and"}))
    columns = ["rater", "verdicts", "shown first", "flips with order", "own model", "beyond others"]
    rows = [_rater_row(rater) for rater in measured.raters]
    parts.append(output.rows("Each rater", columns, rows, left={"rater", "own model"}))
    said = []
    if measured.fleiss is not None:
        kappa = measured.fleiss
        said.append(
            f"Fleiss κ of all raters: {kappa.value:.2f} ({kappa.low:.2f} to {kappa.high:.2f}), over"
            f" {kappa.count:,} items."
        )
    for rater in measured.raters:
        if rater.flips is not None and rater.prefers_first is not None and rater.prefers_second is not None:
            said.append(
                f"{rater.rater}: of {rater.flips.count:,} pairs rated in both orders, the answer shown first won both"
                f" times in {rater.prefers_first:.0%}, the one shown second in {rater.prefers_second:.0%}."
            )
    return Group(*parts, output.sentences([*said, *measured.notes]))


def _pair_row(pair: PairAgreement) -> list[str]:
    return [
        pair.first,
        pair.second,
        _estimate(pair.same, percent=True),
        _estimate(pair.cohen),
        _estimate(pair.kendall),
        _estimate(pair.spearman),
    ]


def _rater_row(rater: RaterReport) -> list[str]:
    own = "" if rater.own is None or rater.own_share is None else f"{rater.own}\ngets {rater.own_share.value:.0%}"
    return [
        rater.rater,
        f"{rater.verdicts:,}",
        _estimate(rater.shown_first, percent=True),
        _estimate(rater.flips, percent=True),
        own,
        _estimate(rater.self_preference, percent=True, sign=True),
    ]


def _estimate(estimate: Estimate | None, *, percent: bool = False, sign: bool = False) -> str:
    """The value, and in a line of its own, as tables have no room for it beside, the interval."""
    if estimate is None:
        return "–"
    values: Sequence[float] = (estimate.value, estimate.low, estimate.high)
    plus = "+" if sign else ""
    if percent:
        shown = [f"{100 * value:{plus}.0f}" for value in values]
        return f"{shown[0]}%\n{shown[1]} to {shown[2]}"
    shown = [f"{value:{plus}.2f}" for value in values]
    return f"{shown[0]}\n{shown[1]} to {shown[2]}"
