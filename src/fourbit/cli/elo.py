"""`fourbit elo`: models ranked by what raters said of pairs of their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fourbit.cli import options, output
from fourbit.errors import InputError
from fourbit.words import duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.evaluate import Ranking, Rating, Share

__all__ = ["elo"]

MOST_COLUMNS = 10
"""Models whose win matrix fits a terminal."""


def elo(
    ratings: options.Ratings,
    method: Annotated[
        Literal["elo", "bradley-terry"],
        typer.Option(help="elo: the mean of tournaments in random orders. bradley-terry: the likeliest strengths."),
    ] = "elo",
    orderings: Annotated[int, typer.Option(help="Random orders in which Elo plays the matches.")] = 10_000,
    matches_per_order: Annotated[
        str, typer.Option(metavar="N|all", help="Matches drawn for each order; the paper's numbers are those of 500.")
    ] = "all",
    k: Annotated[float, typer.Option(help="The most points that a match moves in Elo.")] = 32.0,
    model: Annotated[list[str] | None, typer.Option(help="Rank this model and others so named only.")] = None,
    share_of: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Show each model's scores in percent of this model's, in place of ratings."),
    ] = None,
    name: options.Names = None,
    answers: options.Answers = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the ratings and who beats whom.")] = None,
    samples: options.Samples = 1000,
    seed: Annotated[int, typer.Option(help="Of the orders and of the resamples.")] = 0,
    as_json: output.AsJson = False,
) -> None:
    """Rank models by ratings of pairs of answers, with intervals.

    Reads what `fourbit judge` writes, the ratings released with the QLoRA paper, FastChat's judgements, and tables with
    the columns model_a, model_b and winner. A tie is half a point; both presentation orders count as matches. Intervals
    are 95% bootstraps over prompts; two models cannot be told apart where that of their difference holds 0.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate import read_ratings

        length = _length(matches_per_order)
        if plot is not None:
            from fourbit.evaluate.picture import check_can_draw

            check_can_draw(plot)
        names = options.assignments(name, "--name")
        found = read_ratings(ratings, answers=answers or (), names=names)
        if share_of is not None:
            if plot is not None:
                raise InputError("--plot draws ratings, not shares; leave out one of --plot and --share-of.")
            _show_shares(found, share_of, samples, seed, show)
            return
        started = time.monotonic()
        ranking = _ranked(found, method, orderings, length, k, model or (), samples, seed)
        if plot is not None:
            from fourbit.evaluate.picture import draw

            draw(ranking, plot)
        keys = ranking.record() | {"seconds": time.monotonic() - started, "plot": None if plot is None else str(plot)}
        show(keys, lambda: _table(ranking, keys))


def _length(given: str) -> int | None:
    if given == "all":
        return None
    if given.isdecimal() and int(given) > 0:
        return int(given)
    raise InputError(f"--matches-per-order is {given!r}; it must be a number from 1 on, or all.")


def _ranked(
    ratings: Sequence[Rating],
    method: str,
    orderings: int,
    length: int | None,
    k: float,
    models: Sequence[str],
    samples: int,
    seed: int,
) -> Ranking:
    from fourbit.evaluate import bradley_terry
    from fourbit.evaluate import elo as play
    from fourbit.evaluate.matches import collect

    matches = collect(ratings, models=models)
    with output.progress() as progress:
        if method == "bradley-terry":
            if length is not None:
                raise InputError("--matches-per-order is for Elo; Bradley-Terry takes all matches at once.")
            return bradley_terry(matches, samples=samples, seed=seed, progress=_with_rate(progress, "resamples"))
        return play(
            matches,
            orderings=orderings,
            k=k,
            seed=seed,
            matches_per_order=length,
            samples=samples,
            progress=_with_rate(progress, "matches"),
        )


def _with_rate(progress: output.Progress, what: str) -> Callable[[int, int], None]:
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - started, 1e-9)
        progress(f"playing, {rate / 1e6:,.0f} M matches/s" if what == "matches" else "resampling", done, total)

    return show


def _table(ranking: Ranking, keys: dict[str, Any]) -> RenderableType:
    from rich.console import Group

    name = "Elo" if ranking.method == "elo" else "Bradley-Terry"
    title = f"{name}: {ranking.matches:,} matches on {ranking.prompts:,} prompts, in {duration(keys['seconds'])}"
    numbers = {row.model: place for place, row in enumerate(ranking, start=1)}
    rows = [
        [
            str(place),
            row.model,
            f"{row.elo:.0f}",
            f"{row.low:.0f} – {row.high:.0f}",
            f"{row.matches:,}",
            ", ".join(str(numbers[other]) for other in row.untold),
        ]
        for place, row in enumerate(ranking, start=1)
    ]
    columns = ["#", "model", "rating", "95% interval", "matches", "cannot be told apart from #"]
    parts = [output.rows(title, columns, rows, left={"model", "cannot be told apart from #"})]
    if len(ranking) <= MOST_COLUMNS:
        parts.append(_matrix(ranking))
    first = ranking.shown_first_share
    said = [f"The answer shown first takes {first:.0%} of the points."]
    if ranking.dropped:
        said.append(f"{ranking.dropped:,} ratings could not be parsed, and are left out.")
    if keys["plot"]:
        said.append(f"Drawn: {keys['plot']}")
    return Group(*parts, output.sentences([*said, *ranking.notes]))


def _matrix(ranking: Ranking) -> RenderableType:
    from fourbit.evaluate.picture import win_matrix

    matrix = win_matrix(ranking)
    names = [row.model for row in ranking]
    rows = [
        [str(place), name, *("·" if share != share else f"{100 * share:.0f}" for share in matrix[place - 1])]
        for place, name in enumerate(names, start=1)
    ]
    columns = ["#", "model", *(str(place) for place in range(1, len(names) + 1))]
    return output.rows("Points of the row against the column, in percent", columns, rows, left={"model"})


def _show_shares(ratings: Sequence[Rating], reference: str, samples: int, seed: int, show: output.Show) -> None:
    from dataclasses import asdict

    from fourbit.evaluate import measure_shares

    shares = measure_shares(ratings, reference, samples=samples, seed=seed)
    keys = {"reference": reference, "shares": [asdict(share) for share in shares]}
    show(keys, lambda: _shares_table(shares, reference))


def _shares_table(shares: Sequence[Share], reference: str) -> RenderableType:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    rows = [
        [
            share.model,
            percent(share.reference_first),
            percent(share.model_first),
            percent(share.mean),
            f"{share.low:.1f} – {share.high:.1f}",
            f"{share.judgements:,}",
        ]
        for share in shares
    ]
    columns = ["model", "shown second", "shown first", "both", "95% interval", "judgements"]
    return output.rows(f"Scores in percent of those of {reference}", columns, rows, left={"model"})
