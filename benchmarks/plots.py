"""Pictures for docs/benchmarks.md out of rows, one per question that a reader has. Needs matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourbit.bench import report
from fourbit.bench.case import LIMIT, OURS, Case
from fourbit.bench.rows import Row

Latest = Mapping[str, Sequence[Row]]
Cases = Mapping[str, Case]

BLUE, GREY, ORANGE, LIGHT = "#1a73e8", "#9aa0a6", "#e8710a", "#c6dafc"
MANY = 1.05
"""Room to the right of the longest bar, for its number."""


def pictures(cases: Cases, latest: Latest, folder: Path, prefix: str) -> dict[str, str]:
    """Draw what there are rows for.

    Args:
        cases, latest: see `bench.report.page`.
        folder: where the PNG files go.
        prefix: of their names.

    Returns:
        the name of each file -> the question that it answers.
    """
    import matplotlib as mpl

    mpl.use("agg")
    drawn = {}
    questions = (
        ("speed", "How many times as fast as the peers?", _speed),
        ("tokens", "What does a product with a 4-bit weight cost, by the number of tokens?", _tokens),
        ("step", "How fast is a training step, and what does it hold?", _step),
        ("decode", "How near is decoding to what the memory allows?", _decode),
        ("memory", "Which model fits into which GPU?", _memory),
    )
    for name, question, draw in questions:
        figure = draw(cases, latest)
        if figure is not None:
            file = f"{prefix}-{name}.png"
            figure.savefig(folder / file, metadata={"Software": None})
            drawn[file] = question
    return drawn


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib import pyplot

    pyplot.close("all")
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), dpi=120, layout="constrained")
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _speed(cases: Cases, latest: Latest) -> Any:
    """A bar per case and peer, with a mark where the bar that was set lies."""
    found = []
    for name, case in cases.items():
        for standing in report.standings(case, latest.get(name, ())):
            peer = standing.bar.against
            if standing.bar.kind == "speed" and not peer.startswith(OURS):
                ours = "" if standing.bar.ours == case.contenders[0].name else f" ({standing.bar.ours})"
                found.append((f"{name}{ours}\nbeside {peer}", standing.value, standing.bar.bound))
    if not found:
        return None
    figure, axes = _figure(8, 0.9 + 0.44 * len(found))
    for place, (_, value, bound) in enumerate(reversed(found)):
        axes.barh(place, value, color=BLUE if value >= bound else ORANGE, height=0.6)
        axes.plot([bound, bound], [place - 0.38, place + 0.38], color="black", linewidth=2)
        axes.text(max(value, bound) * 1.06, place, f"{value:.2f}×" if value < 10 else f"{value:.0f}×", va="center")
    axes.set_yticks(range(len(found)), [label for label, *_ in reversed(found)], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(0.5, max(max(value, bound) for _, value, bound in found) * 1.8)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color=GREY, linewidth=1, zorder=0)
    axes.set_title("fourbit's speed beside each peer; black: what we ask of ourselves (orange: missed)", fontsize=10)
    return figure


def _tokens(cases: Cases, latest: Latest) -> Any:
    """A line per contender over the number of tokens, for the matrix that was measured with most of them."""
    series: dict[str, dict[int, dict[str, Row]]] = {}
    for name in cases:
        if found := re.fullmatch(r"(linear(?:-\d+x\d+)?)-(\d+)", name):
            series.setdefault(found[1], {})[int(found[2])] = {row.contender: row for row in latest.get(name, ())}
    matrix, measured = max(series.items(), key=lambda item: sum(map(bool, item[1].values())), default=("", {}))
    measured = {tokens: rows for tokens, rows in sorted(measured.items()) if rows}
    if len(measured) < 2:
        return None
    names = [name for name in next(iter(measured.values())) if not name.startswith((LIMIT, f"{OURS}, variant"))]
    unit = next(iter(next(iter(measured.values())).values())).unit
    figure, axes = _figure(7, 4)
    colours = (BLUE, "#34a853", GREY, ORANGE, "#a142f4", "#5f6368")
    for name, colour in zip(names, colours, strict=False):
        points = [(tokens, rows[name].median) for tokens, rows in measured.items() if name in rows]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xticks(list(measured), [f"{tokens:,}" for tokens in measured])
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    axes.legend(frameon=False, fontsize=8)
    where = matrix.removeprefix("linear").strip("-").replace("x", " × ") or "4096 × 4096"
    axes.set_title(f"One linear layer, {where} in NF4, weights in no cache", fontsize=10)
    return figure


def _step(cases: Cases, latest: Latest) -> Any:
    """Two panels: tokens a second and peak memory; pale with checkpointing."""
    found = [name for name in cases if name.split("-")[0] == "step" and latest.get(name)][:2]
    if not found:
        return None
    names = [row.contender for row in latest[found[0]] if not row.contender.startswith(LIMIT)]
    figure, panels = _figure(9, 1.2 + 0.5 * len(names), columns=2)
    values = (
        ("tokens a second", lambda row: row.median, "{:,.0f}"),
        ("peak memory, GB", lambda row: (row.peak_device_bytes or row.peak_rss_bytes) / 1e9, "{:.2f}"),
    )
    for axes, (title, value, text) in zip(panels, values, strict=True):
        largest = 0.0
        for number, case in enumerate(found):
            rows = {row.contender: row for row in latest[case]}
            for place, name in enumerate(reversed(names)):
                if name not in rows:
                    continue
                at, length = place + 0.19 - 0.38 * number, value(rows[name])
                strong, pale = (BLUE, LIGHT) if name == OURS else ("#5f6368", "#dadce0")
                axes.barh(at, length, color=pale if number else strong, height=0.36)
                axes.text(length, at, f" {text.format(length)}", va="center", fontsize=8)
                largest = max(largest, length)
        axes.set_xlim(0, largest * 1.2)
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(names)), list(reversed(names)) if axes is panels[0] else [""] * len(names))
    figure.suptitle(f"{cases[found[0]].title}; pale: with gradient checkpointing", fontsize=9)
    return figure


def _decode(cases: Cases, latest: Latest) -> Any:
    """Shares of the bandwidth at batch 1, a bar per shape."""
    found = []
    for name in cases:
        rows = {row.contender: row for row in latest.get(name, ())}
        if re.fullmatch(r"decode-.+-1", name) and OURS in rows and rows[OURS].share is not None:
            found.append((name.removeprefix("decode-").removesuffix("-1"), rows[OURS]))
    if not found:
        return None
    figure, axes = _figure(7, 1.2 + 0.5 * len(found))
    for place, (_, row) in enumerate(reversed(found)):
        axes.barh(place, 100 * row.share, color=BLUE, height=0.6)
        axes.text(100 * row.share, place, f" {row.share:.0%}, {row.median:.0f} tokens/s", va="center")
    axes.set_yticks(range(len(found)), [name for name, _ in reversed(found)])
    axes.set_xlim(0, 100 * MANY)
    axes.set_xlabel("bytes of the weights over the time of a token, % of read bandwidth")
    axes.set_title("Greedy decode at batch 1", fontsize=10)
    return figure


def _memory(cases: Cases, latest: Latest) -> Any:
    """Peak memory by shape, with the sizes of GPUs."""
    found = [(name, row) for name in cases if name.startswith("memory-") for row in latest.get(name, ())]
    found = [(name, row) for name, row in found if row.contender == OURS and row.device]
    if not found:
        return None
    figure, axes = _figure(7, 1.2 + 0.5 * len(found))
    for place, (_, row) in enumerate(reversed(found)):
        axes.barh(place, row.median, color=BLUE, height=0.6)
        axes.text(row.median, place, f" {row.median:.1f} GB", va="center")
    for size in (8, 12, 16, 24, 48, 80):
        axes.axvline(size, color=GREY, linewidth=0.8, linestyle=":")
        axes.text(size, len(found) - 0.4, f"{size}", ha="center", fontsize=8, color="#5f6368")
    axes.set_yticks(range(len(found)), [re.sub(r"^memory-|-1x.*$", "", name) for name, _ in reversed(found)])
    axes.set_xlabel("GB held at most; dotted: GPUs of that size")
    axes.set_title("QLoRA step of 1 × 512 tokens, optimizer states elsewhere", fontsize=10, pad=16)
    return figure
