"""The picture of a ranking: ratings with their intervals, and who takes how many points from whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError, MissingExtra
from fourbit.evaluate.ranking import Ranking

__all__ = ["check_can_draw", "draw", "win_matrix"]

BLUE, GREY = "#1a73e8", "#5f6368"
MOST_LABELLED = 16
"""Models whose matrix has room for numbers."""


def check_can_draw(path: str | os.PathLike[str]) -> None:
    """Say early that a picture cannot be drawn.

    Raises:
        MissingExtra: matplotlib is not installed. InputError: a file name that is no PNG, or in no folder.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise InputError(f"The plot is to go to {target}; give it a name that ends in .png.")
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {target.parent} for the plot.")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra("Drawing needs matplotlib; install it with `pip install 'fourbit[eval]'`.") from error


def win_matrix(ranking: Ranking) -> NDArray[np.float64]:
    """[P, P] points of the row's model against the column's, as a share; NaN where they never met."""
    place = {standing.model: number for number, standing in enumerate(ranking)}
    matrix = np.full((len(place), len(place)), np.nan)
    for pair in ranking.pairs:
        if pair.matches:
            one, other = place[pair.first], place[pair.second]
            matrix[one, other] = pair.points / pair.matches
            matrix[other, one] = 1 - matrix[one, other]
    return matrix


def draw(ranking: Ranking, path: str | os.PathLike[str]) -> None:
    """Write the picture as a PNG file, whole or not at all.

    Raises:
        InputError, MissingExtra: see `check_can_draw`.
    """
    check_can_draw(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(ranking)
    height = 1.6 + 0.34 * max(count, 4)
    figure = Figure(figsize=(6.4 + 1.5 + 0.42 * max(count, 4), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[5.2, 1.5 + 0.42 * max(count, 4)])
    _draw_ratings(left, ranking)
    _draw_matrix(right, ranking)
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", metadata={"Software": None})
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_ratings(axes: Any, ranking: Ranking) -> None:
    rows = list(ranking)
    places = np.arange(len(rows))
    ratings = np.array([row.elo for row in rows])
    reach = np.array([[row.elo - row.low for row in rows], [row.high - row.elo for row in rows]])
    axes.errorbar(
        ratings, places, xerr=np.clip(reach, 0, None), fmt="o", color=BLUE, ecolor=BLUE, elinewidth=2, markersize=6
    )
    for place, row in zip(places, rows, strict=True):
        axes.annotate(
            f"{row.elo:.0f}", (row.elo, place), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=GREY
        )
    axes.set_yticks(places, [row.model for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    name = "Elo" if ranking.method == "elo" else "Bradley–Terry rating, in Elo points"
    axes.set_xlabel(f"{name}, 95% interval over prompts")
    axes.set_title(f"{ranking.matches:,} matches on {ranking.prompts:,} prompts", fontsize=10, loc="left")


def _draw_matrix(axes: Any, ranking: Ranking) -> None:
    matrix = win_matrix(ranking)
    names = [row.model for row in ranking]
    axes.imshow(matrix, cmap="RdBu", vmin=0, vmax=1, aspect="equal")
    if len(names) <= MOST_LABELLED:
        for one, other in np.argwhere(~np.isnan(matrix)):
            share = matrix[one, other]
            color = "white" if abs(share - 0.5) > 0.3 else "black"
            axes.text(other, one, f"{share * 100:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Points of the row against the column, %", fontsize=10, loc="left")
