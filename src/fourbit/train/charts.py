"""Line charts as SVG: no picture files, sharp at any size, and in the colours of the page around them."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Series", "draw", "smooth"]

LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 34
"""The margins around the plotted area."""

MAX_POINTS = 1200
"""More of them than pixels only make the file larger."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: in the legend.
        points: (step, value), by step.
        style: the CSS class: `main`, `second` or `faint`.
        dots: mark each point; for lines of few.
        fill: shade the area below.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "main"
    dots: bool = False
    fill: bool = False


def draw(
    series: Sequence[Series],
    *,
    title: str,
    width: int = 360,
    height: int = 210,
    number: Callable[[float], str] = lambda value: f"{value:.4g}",
    from_zero: bool = False,
) -> str:
    """An `<svg>` element; empty where there is nothing to draw.

    Args:
        title: what the values are, for those who hear the page.
        width, height: in the unit of its letters, which are 11.5 high.
        number: how a value is written.
        from_zero: let the axis begin at 0; otherwise a little below the lowest value.
    """
    series = [Series(s.name, _thin(s.points), s.style, s.dots, s.fill) for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x_ticks = _ticks(min(xs), max(xs), 1 + width // 130, whole=True)
    low, high = _range(min(ys), max(ys), from_zero=from_zero)
    y_ticks = _ticks(low, high, 4)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    place = _Place(min(xs), max(xs), low, high, width, height)
    parts = [
        *(_grid_line(place, tick, number(tick)) for tick in y_ticks),
        *(_step_label(place, tick) for tick in x_ticks if min(xs) <= tick <= max(xs)),
        f'<text class="label" x="{width - RIGHT}" y="{place.bottom + 17}" text-anchor="end">step</text>',
        *(_line(place, s) for s in series),
        f'<line class="cursor" y1="{TOP}" y2="{place.bottom}"/>',
    ]
    data = json.dumps(
        {
            "left": place.x(min(xs)),
            "right": place.x(max(xs)),
            "series": [{"name": s.name, "points": [[x, place.x(x), number(y)] for x, y in s.points]} for s in series],
        }
    )
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}"'
        f' data-chart="{html.escape(data)}">{"".join(parts)}</svg>'
    )


def smooth(points: Sequence[tuple[float, float]], *, weight: float) -> list[tuple[float, float]]:
    """An exponential mean that is not pulled towards where it starts.

    Args:
        weight: of what came before, below 1.
    """
    mean, total, smoothed = 0.0, 0.0, []
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        smoothed.append((x, mean / total))
    return smoothed


@dataclass(frozen=True)
class _Place:
    """From values to pixels."""

    first: float
    last: float
    low: float
    high: float
    width: int
    height: int

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.bottom - share * (self.bottom - TOP), 1)


def _grid_line(place: _Place, tick: float, label: str) -> str:
    y = place.y(tick)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{place.width - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="label" x="{LEFT - 8}" y="{y + 3.5}" text-anchor="end">{html.escape(label)}</text>'
    )


def _step_label(place: _Place, tick: float) -> str:
    if place.x(tick) > place.width - RIGHT - 44:  # the word "step" stands there
        return ""
    return f'<text class="label" x="{place.x(tick)}" y="{place.bottom + 17}" text-anchor="middle">{int(tick):,}</text>'


def _line(place: _Place, series: Series) -> str:
    places = [(place.x(x), place.y(y)) for x, y in series.points]
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    parts = []
    if series.fill and len(places) > 1:
        down, back = f"L{places[-1][0]} {place.bottom}", f"L{places[0][0]} {place.bottom}"
        parts.append(f'<path class="area {series.style}" d="{path}{down}{back}Z"/>')
    parts.append(f'<path class="line {series.style}" d="{path}"/>')
    if series.dots or len(places) == 1:
        parts += [f'<circle class="dot {series.style}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places]
    return "".join(parts)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every so many-th point, and the last."""
    stride = math.ceil(len(points) / MAX_POINTS)
    return [*points[:-1:stride], points[-1]] if stride > 1 else list(points)


def _range(low: float, high: float, *, from_zero: bool) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (min(0.0, low) if from_zero else low - margin), high + margin


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About `count` round numbers, or `whole` ones, within a range."""
    span = high - low
    if span <= 0:
        return [low]
    raw = max(span / count, 1) if whole else span / count
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    stride = next((f * power for f in factors if f * power >= raw * 0.999), 10 * power)
    first = math.ceil(low / stride - 1e-9)
    last = math.floor(high / stride + 1e-9)
    return [round(index * stride, 12) for index in range(first, last + 1)] or [low, high]
