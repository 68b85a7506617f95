"""How far raters agree: on single answers (Fleiss, Cohen), on the order of the models (Kendall, Spearman), with
themselves when the answers change places, and when an answer is their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fourbit.errors import InputError, MissingExtra
from fourbit.evaluate.bootstrap import bootstrap_interval
from fourbit.evaluate.likelihood import strengths
from fourbit.evaluate.ranking import LEVEL, check_samples, resamples
from fourbit.evaluate.ratings import Rating
from fourbit.evaluate.verdicts import BEST, EVEN, MISSING, WORST, Verdicts, tabulate

__all__ = ["Agreement", "Estimate", "PairAgreement", "RaterReport", "cohen_kappa", "fleiss_kappa", "measure_agreement"]

Numbers = NDArray[np.float64]

FEWEST_MODELS = 3
"""Two rankings of two models are either equal or opposite, which says little."""


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap interval over prompts, and the number of items (or models) it is of."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class RaterReport:
    """What can be said of one rater.

    Attributes:
        verdicts: items rated.
        shown_first: points of the answer shown first, as a share: 1/2 without order bias. None for a majority.
        flips: of the items rated in both orders, the share whose verdict changed with the order.
        prefers_first, prefers_second: of these, the share where the answer shown first, or second, won both times.
        own: the model that is the rater itself, if there is one.
        own_share: the points that the rater gives that model, as a share.
        self_preference: `own_share` less what the other raters give it on the same items.
    """

    rater: str
    verdicts: int
    shown_first: Estimate | None
    flips: Estimate | None
    prefers_first: float | None
    prefers_second: float | None
    own: str | None
    own_share: Estimate | None
    self_preference: Estimate | None


@dataclass(frozen=True)
class PairAgreement:
    """Two raters, or a rater and a benchmark.

    Attributes:
        same: the share of items with the same verdict of three (one model, the other, a tie).
        cohen: kappa over these items; None without common items, or where both always say the same one thing.
        kendall, spearman: tau-b and rho of the models' ratings; None with fewer than three common models.
    """

    first: str
    second: str
    same: Estimate | None
    cohen: Estimate | None
    kendall: Estimate | None
    spearman: Estimate | None


@dataclass(frozen=True)
class Agreement:
    """Everything about a set of raters.

    Attributes:
        fleiss: kappa of all raters (majorities left out), over the items that two or more of them rated.
        notes: what a reader should know, a sentence each.
    """

    raters: tuple[RaterReport, ...]
    pairs: tuple[PairAgreement, ...]
    fleiss: Estimate | None
    notes: tuple[str, ...]


def measure_agreement(
    ratings: Mapping[str, Sequence[Rating]],
    *,
    benchmarks: Mapping[str, Mapping[str, float]] | None = None,
    majorities: Mapping[str, Sequence[str]] | None = None,
    selves: Mapping[str, str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Compare raters with each other and with benchmarks.

    Args:
        ratings: by rater.
        benchmarks: name -> model -> score; compared at the system level.
        majorities: name -> raters; see `tabulate`.
        selves: rater -> the model that it is; by default a model whose name is part of the rater's.
        samples, seed: of the bootstrap over prompts.

    Raises:
        InputError: nothing to compare. MissingExtra: scipy is not installed.
    """
    check_samples(samples)
    benchmarks = benchmarks or {}
    if not ratings:
        raise InputError("There are no ratings to compare.")
    verdicts = tabulate(ratings, majorities or {})
    if clash := set(benchmarks) & set(verdicts.raters):
        raise InputError(f"{min(clash)} is the name of a rater and of a benchmark; give each its own.")
    many = len(ratings)
    draw = _Draw(samples, seed)
    pairs = []
    scales = _scales(verdicts, benchmarks, draw)
    for one, other in combinations([*verdicts.raters, *benchmarks], 2):
        if one in benchmarks:
            continue
        same, cohen = _item_level(verdicts, one, other, draw) if other not in benchmarks else (None, None)
        kendall, spearman = _system_level(scales[one], scales[other])
        pairs.append(PairAgreement(one, other, same, cohen, kendall, spearman))
    owns = _selves(verdicts, selves or {})
    return Agreement(
        raters=tuple(
            _report(verdicts, number, owns.get(rater), many, draw) for number, rater in enumerate(verdicts.raters)
        ),
        pairs=tuple(pairs),
        fleiss=_fleiss(verdicts, many, draw) if many > 1 else None,
        notes=tuple(_notes(verdicts, pairs, benchmarks)),
    )


@dataclass(frozen=True)
class _Draw:
    """The bootstrap: equal for all that is measured, so that intervals pair."""

    samples: int
    seed: int

    def estimate(
        self, statistic: Callable[[Numbers], Numbers], columns: Numbers, prompts: NDArray[np.int64], count: int
    ) -> Estimate | None:
        """A statistic of column sums; None where it is not defined.

        Args:
            statistic: [n, C] sums to [n] values.
            columns: [N, C], one row per item.
            prompts: [N], the prompt of each row.
            count: for the reader.
        """
        if not len(columns):
            return None
        present, index = np.unique(prompts, return_inverse=True)
        sums = np.zeros((len(present), columns.shape[1]))
        np.add.at(sums, index, columns)
        value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
        if np.isnan(value):
            return None

        def defined(rows: Numbers) -> Numbers:
            return np.nan_to_num(statistic(rows), nan=value)  # a resample without a meaning says nothing new

        low, high = bootstrap_interval(defined, sums, samples=self.samples, level=LEVEL, seed=self.seed)
        return Estimate(value, low, high, count)


def _share(sums: Numbers) -> Numbers:
    return _over(sums[:, 0], sums[:, 1])


def _over(top: Numbers, bottom: Numbers) -> Numbers:
    """The quotient, NaN where there is none."""
    return np.where(bottom != 0, top / np.where(bottom != 0, bottom, 1), np.nan)


def cohen_kappa(confusion: Numbers) -> Numbers:
    """Agreement of two raters beyond chance: (p_o - p_e) / (1 - p_e).

    Args:
        confusion: [n, 9] counts by the verdict of the one and of the other.

    Returns:
        [n]; NaN where both always give the same single verdict, for which chance explains everything.
    """
    table = confusion.reshape(-1, 3, 3)
    total = table.sum(axis=(1, 2))
    same = _over(np.trace(table, axis1=1, axis2=2), total)
    chance = _over((table.sum(axis=1) * table.sum(axis=2)).sum(axis=1), total**2)
    return _over(same - chance, 1 - chance)


def fleiss_kappa(sums: Numbers) -> Numbers:
    """Agreement of many raters beyond chance, where items may have different numbers of raters.

    Args:
        sums: [n, 5]: over the items, of the share of pairs of its raters that agree, of 1, and of the counts of each of
            three verdicts.

    Returns:
        [n]; NaN where all always give the same single verdict.
    """
    same = _over(sums[:, 0], sums[:, 1])
    chance = (sums[:, 2:] ** 2).sum(axis=1) / np.maximum(sums[:, 2:].sum(axis=1), 1) ** 2
    return _over(same - chance, 1 - chance)


def _item_level(verdicts: Verdicts, one: str, other: str, draw: _Draw) -> tuple[Estimate | None, Estimate | None]:
    rows = verdicts.table[[verdicts.raters.index(one), verdicts.raters.index(other)]]
    both = (rows != MISSING).all(axis=0)
    cells = np.eye(9)[3 * rows[0, both] + rows[1, both]]
    prompts, count = verdicts.prompts[both], int(both.sum())
    same = np.stack([cells[:, [0, 4, 8]].sum(axis=1), np.ones(count)], axis=1)
    return draw.estimate(_share, same, prompts, count), draw.estimate(cohen_kappa, cells, prompts, count)


def _fleiss(verdicts: Verdicts, many: int, draw: _Draw) -> Estimate | None:
    counts = np.stack([(verdicts.table[:many] == category).sum(axis=0) for category in (BEST, WORST, EVEN)], axis=1)
    raters = counts.sum(axis=1)
    kept = raters > 1
    counts, raters = counts[kept].astype(np.float64), raters[kept]
    same = ((counts**2).sum(axis=1) - raters) / (raters * (raters - 1))
    columns = np.column_stack([same, np.ones(len(same)), counts])
    return draw.estimate(fleiss_kappa, columns, verdicts.prompts[kept], int(kept.sum()))


def _scales(
    verdicts: Verdicts, benchmarks: Mapping[str, Mapping[str, float]], draw: _Draw
) -> dict[str, tuple[Numbers, Numbers]]:
    """By rater: [P] its Bradley-Terry ratings of the models, NaN for those it did not rate, and [B, P] resampled."""
    count = len(verdicts.models)
    drawn = resamples(verdicts.prompt_count, draw.samples, seed=draw.seed)
    cells = verdicts.pairs[:, 0] * count + verdicts.pairs[:, 1]
    back = verdicts.pairs[:, 1] * count + verdicts.pairs[:, 0]
    found = {}
    for number, rater in enumerate(verdicts.raters):
        points = verdicts.points(number)
        said = ~np.isnan(points)
        rated = np.unique(verdicts.pairs[said])
        won = np.empty((draw.samples + 1, count * count))
        for row, times in zip(won, [np.ones(verdicts.prompt_count), *drawn], strict=True):
            own = times[verdicts.prompts[said]]
            row[:] = np.bincount(cells[said], weights=own * points[said], minlength=count * count)
            row += np.bincount(back[said], weights=own * (1 - points[said]), minlength=count * count)
        square = won.reshape(-1, count, count)[:, rated][:, :, rated]
        values = np.full((draw.samples + 1, count), np.nan)
        values[:, rated] = strengths(square)
        found[rater] = values[0], values[1:]
    for name, scores in benchmarks.items():
        known = np.array([scores.get(model, np.nan) for model in verdicts.models])
        found[name] = known, np.tile(known, (draw.samples, 1))
    return found


def _system_level(
    one: tuple[Numbers, Numbers], other: tuple[Numbers, Numbers]
) -> tuple[Estimate | None, Estimate | None]:
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise MissingExtra("Rank correlations need scipy; install it with `pip install 'fourbit[eval]'`.") from error
    common = ~np.isnan(one[0]) & ~np.isnan(other[0])
    count = int(common.sum())
    if count < FEWEST_MODELS or np.ptp(one[0][common]) == 0 or np.ptp(other[0][common]) == 0:
        return None, None
    tau = float(stats.kendalltau(one[0][common], other[0][common]).statistic)
    rho = float(stats.spearmanr(one[0][common], other[0][common]).statistic)
    first, second = one[1][:, common], other[1][:, common]
    return (
        _with_interval(tau, _kendall(first, second), count),
        _with_interval(rho, _pearson(stats.rankdata(first, axis=1), stats.rankdata(second, axis=1)), count),
    )


def _with_interval(value: float, resampled: Numbers, count: int) -> Estimate:
    low, high = np.quantile(np.nan_to_num(resampled, nan=value), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), count)


def _kendall(one: Numbers, other: Numbers) -> Numbers:
    """tau-b of the rows of [B, P]: the cosine between the signs of all differences."""
    signs = [np.sign(values[:, :, None] - values[:, None, :]) for values in (one, other)]
    scale = np.sqrt((signs[0] ** 2).sum(axis=(1, 2)) * (signs[1] ** 2).sum(axis=(1, 2)))
    return _over((signs[0] * signs[1]).sum(axis=(1, 2)), scale)


def _pearson(one: Numbers, other: Numbers) -> Numbers:
    centred = [values - values.mean(axis=1, keepdims=True) for values in (one, other)]
    scale = np.sqrt((centred[0] ** 2).sum(axis=1) * (centred[1] ** 2).sum(axis=1))
    return _over((centred[0] * centred[1]).sum(axis=1), scale)


def _report(verdicts: Verdicts, number: int, own: str | None, many: int, draw: _Draw) -> RaterReport:
    rater = verdicts.raters[number]
    shown = verdicts.shown.get(rater)
    orders = verdicts.orders.get(rater, np.empty((0, 3), dtype=np.int64))
    in_order, swapped = orders[:, 1], orders[:, 2]
    flips = np.column_stack([in_order != swapped, np.ones(len(orders))])
    own_share, preference = (None, None) if own is None else _self_preference(verdicts, number, own, many, draw)
    return RaterReport(
        rater=rater,
        verdicts=int((verdicts.table[number] != MISSING).sum()),
        shown_first=None
        if shown is None
        else draw.estimate(
            _share, np.column_stack([shown[:, 1], np.ones(len(shown))]), shown[:, 0].astype(np.int64), len(shown)
        ),
        flips=draw.estimate(_share, flips, orders[:, 0], len(orders)),
        prefers_first=float(((in_order == BEST) & (swapped == WORST)).mean()) if len(orders) else None,
        prefers_second=float(((in_order == WORST) & (swapped == BEST)).mean()) if len(orders) else None,
        own=own,
        own_share=own_share,
        self_preference=preference,
    )


def _self_preference(
    verdicts: Verdicts, number: int, own: str, many: int, draw: _Draw
) -> tuple[Estimate | None, Estimate | None]:
    model = verdicts.models.index(own)
    about = (verdicts.pairs == model).any(axis=1)
    leads = verdicts.pairs[:, 0] == model

    def gained(rater: int) -> Numbers:
        points = verdicts.points(rater)
        return np.where(leads, points, 1 - points)

    mine = gained(number)
    said = about & ~np.isnan(mine)
    share = draw.estimate(
        _share, np.column_stack([mine[said], np.ones(said.sum())]), verdicts.prompts[said], int(said.sum())
    )
    others = np.array([gained(other) for other in range(many) if other != number]).reshape(-1, len(mine))
    heard = said & (~np.isnan(others)).any(axis=0)
    if not heard.any():
        return share, None
    difference = mine[heard] - np.nanmean(others[:, heard], axis=0)
    columns = np.column_stack([difference, np.ones(len(difference))])
    return share, draw.estimate(_share, columns, verdicts.prompts[heard], int(heard.sum()))


def _selves(verdicts: Verdicts, given: Mapping[str, str]) -> dict[str, str]:
    """Rater -> the model that it is."""
    for rater, model in given.items():
        if rater not in verdicts.raters or model not in verdicts.models:
            missing, known = (model, verdicts.models) if rater in verdicts.raters else (rater, verdicts.raters)
            raise InputError(f"There is no {missing!r}; there are {', '.join(known)}.")
    found = dict(given)
    for rater in verdicts.raters:
        named = [model for model in verdicts.models if _letters(model) and _letters(model) in _letters(rater)]
        if named and rater not in found:
            found[rater] = max(named, key=len)
    return found


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _notes(
    verdicts: Verdicts, pairs: Sequence[PairAgreement], benchmarks: Mapping[str, Mapping[str, float]]
) -> list[str]:
    notes = []
    apart = [pair for pair in pairs if pair.same is None and pair.second not in benchmarks]
    if apart:
        notes.append(
            f"{apart[0].first} and {apart[0].second} rated no item in common; are prompts and models named alike?"
        )
    for name, scores in benchmarks.items():
        if unknown := [model for model in verdicts.models if model not in scores]:
            notes.append(f"{name} has no score of {', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}.")
    if len(verdicts.raters) == 1 and not benchmarks:
        notes.append("There is one rater only, who has nobody to agree with.")
    return notes
