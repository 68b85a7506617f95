"""`report.html`: one file that shows how a run went, and what to do with what came out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fourbit.memory.plan import PARTS
from fourbit.pages import render_page, short_name
from fourbit.train.charts import Series, draw, smooth
from fourbit.train.config import TrainConfig
from fourbit.train.samples import Sample
from fourbit.words import duration, size

__all__ = ["model_arguments", "write_report"]

TEMPLATE = "report.html.j2"


def write_report(
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[Sample],
    sentences: Sequence[str],
) -> str:
    """The text of an HTML file that needs nothing beside it.

    Args:
        metrics: what `metrics.json` holds.
        history: the rows of `history.jsonl`.
        samples: with their answers.
        sentences: what was said about the data.
    """
    config = metrics["config"]
    return render_page(
        Path(__file__).with_name(TEMPLATE),
        metrics=metrics,
        model=short_name(config["model"]),
        data=short_name(config["data"]),
        tiles=_tiles(metrics),
        charts=_charts(history),
        samples=samples,
        sentences=sentences,
        memory=_memory(metrics),
        events=[str(row["sentence"]) for row in history if "event" in row],
        settings=_settings(config),
        commands=_commands(metrics),
    )


def _tiles(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and a remark of what stands at the top."""
    tiles = []
    before, after = metrics["eval_loss_before"], metrics["eval_loss"]
    if after is not None:
        count = f"{metrics['eval_examples']:,} held-out examples"
        remark = count if before is None else f"from {before:.3f}, {count}"
        tiles.append(("evaluation loss", f"{after:.3f}", remark))
    elif metrics["train_loss"] is not None:
        tiles.append(("training loss", f"{metrics['train_loss']:.3f}", "mean over all steps"))
    trained = f"{metrics['trainable_parameters']:,} of {metrics['parameters']:,}"
    share = metrics["trainable_parameters"] / metrics["parameters"]
    rate = metrics["tokens_per_second"]
    tiles += [
        ("steps", f"{metrics['steps']:,}", f"{metrics['epochs']:.2f} epochs, {metrics['tokens']:,} tokens"),
        ("speed", "–" if rate is None else f"{rate:,.0f}", "tokens a second"),
        ("peak memory", size(metrics["peak_bytes"]), metrics["device"]),
        ("training time", duration(metrics["training_seconds"]), "without evaluation and saving"),
        ("parameters trained", f"{share:.2%}", trained),
    ]
    return tiles


def _memory(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Part of the peak, what was planned and what was measured; what cannot be told apart stands in one row."""
    planned, measured = metrics.get("planned_parts"), metrics.get("measured_parts")
    if not planned or not measured:
        return []
    told = {name: count for name, count in measured.items() if name != "step"}
    rows = [(PARTS[name], size(planned[name]), size(count)) for name, count in told.items() if planned[name] or count]
    left = [name for name in planned if name not in told and planned[name]]
    together = ", ".join(PARTS[name] for name in left)
    rows.append((together, " + ".join(size(planned[name]) for name in left), size(measured["step"])))
    return [*rows, ("together", size(sum(planned.values())), size(metrics["peak_bytes"]))]


def _charts(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Title, legend (name, style) and picture."""
    steps = [row for row in history if "loss" in row]
    loss = [(row["step"], row["loss"]) for row in steps]
    lines = [Series("training", loss)]
    if len(loss) > 20:
        lines = [Series("each step", loss, "faint"), Series("training, smoothed", smooth(loss, weight=0.9))]
    scored = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    lines.append(Series("evaluation", scored, "second", dots=True))
    rates = [
        (now["step"], (now["tokens"] - then["tokens"]) / max(now["seconds"] - then["seconds"], 1e-9))
        for then, now in pairwise(steps)
    ]
    memory = [(row["step"], row["memory_bytes"]) for row in steps]
    peak = [(row["step"], row["peak_bytes"]) for row in steps]
    rate = [(row["step"], row["learning_rate"]) for row in steps]
    pictures = [
        ("Loss", lines, {"width": 1000, "height": 300}),
        ("Learning rate", [Series("learning rate", rate, fill=True)], {"from_zero": True, "number": _scientific}),
        (
            "Memory",
            [Series("held", memory, fill=True), Series("peak so far", peak, "second")],
            {"from_zero": True, "number": size},
        ),
        ("Tokens a second", [Series("tokens a second", rates, fill=True)], {"from_zero": True, "number": _thousands}),
    ]
    drawn: list[tuple[str, list[tuple[str, str]], str]] = []
    for title, series, options in pictures:
        legend = [(s.name, s.style) for s in series if s.points]
        picture = draw(series, title=title, **options)  # type: ignore[arg-type]  # the options differ in type
        if picture:
            drawn.append((title, legend, picture))
    return drawn


def _scientific(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}"


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Key, value, and whether it was given."""
    plain = TrainConfig(model="-", data="-", output="-").to_full_dict()
    return [
        (key, _plain(value), key not in plain or plain[key] != value)
        for key, value in config.items()
        if value is not None or key not in plain
    ]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def model_arguments(config: Mapping[str, Any]) -> str:
    """What names the trained model in a command: the base, the adapter, and how it was loaded."""
    words = [str(config["model"]), "--adapter", str(config["output"])]
    for key in ("format", "block_size", "revision"):
        if config[key] is not None:
            words += [f"--{key.replace('_', '-')}", str(config[key])]
    if config["double_quant"] is not None:
        words.append("--double-quant" if config["double_quant"] else "--no-double-quant")
    if config["trust_remote_code"]:
        words.append("--trust-remote-code")
    return shlex.join(words)


def _commands(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it is good for, and the command."""
    model = model_arguments(metrics["config"])
    steps, epochs = metrics["config"]["max_steps"], metrics["config"]["num_train_epochs"]
    longer = f"max_steps={2 * steps}" if steps > 0 else f"num_train_epochs={2 * epochs:g}"
    output, data = (shlex.quote(str(metrics["config"][key])) for key in ("output", "data"))
    return [
        ("Talk to it", f"fourbit chat {model}"),
        (
            "Have it answer a file of prompts",
            f"fourbit generate {model} --prompts prompts.jsonl --output answers.jsonl",
        ),
        ("Score a text", f"fourbit eval perplexity {model} --text text.txt"),
        ("Train longer", f"fourbit train --output {output} --resume {longer}"),
        ("Do it again elsewhere", f"fourbit train {output}/config.yaml output=again data={data}"),
    ]
