"""`fourbit data ...`: what a model would learn from data, before it does."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import output
from fourbit.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from fourbit.data.colours import Coloured
    from fourbit.data.lint import Lint
    from fourbit.train import TrainConfig

__all__ = ["app", "lint", "preview"]

app = typer.Typer(help="Look at data before training on it.")

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG.yaml|KEY=VALUE",
        help="As `fourbit train` takes them: max_length=1024 packing=true loss_on=all eval_data=FILE eval_size=100 …",
    ),
]
ModelFlag = Annotated[str | None, typer.Option("--model", help="A model folder, or a name on the Hugging Face hub.")]
DataFlag = Annotated[str | None, typer.Option("--data", help="A file, a folder of files, or a name on the hub.")]

STYLES = {"loss": "bold green", "data": "default", "template": "blue", "cut": "red strike"}
MARKS = {"loss": ("⟦", "⟧"), "data": ("", ""), "template": ("‹", "›"), "cut": ("✂", "✂")}
"""Where there are no colours."""

VERDICTS = {"ok": "green", "note": "yellow", "problem": "bold red"}
BAR = 40


@app.callback()
def _data() -> None:
    pass


@app.command()
def lint(
    arguments: Arguments = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    html: Annotated[Path | None, typer.Option(help="A page to write, with samples whose tokens are coloured.")] = None,
    as_json: output.AsJson = False,
) -> None:
    """Check data as a training run would see it, and say what to do about it.

    Every example is tokenized and masked as for training: what carries loss, whether the end of a turn is learned, what
    is cut off or left out and why, duplicates, leakage into the evaluation, and more. No weights are read; a model
    folder with a tokenizer and a config.json is enough. Ends with 2 where training would: when no label survives.
    """
    with output.result(as_json) as show:
        config = _read(arguments or [], model, data)
        from fourbit.data.lint import lint_data
        from fourbit.data.page import write_page
        from fourbit.train.material import pack_lengths, settle_tokenizer

        if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
            raise InputError(f"{html} cannot be written: give a file in a folder that exists.")
        tokenizer, max_length, said = settle_tokenizer(config)
        with output.progress() as progress:
            found = lint_data(
                config.data,
                tokenizer,
                max_length=max_length,
                loss_on=config.loss_on,
                eval_source=config.eval_data,
                eval_size=config.eval_size,
                seed=config.data_seed,
                split=config.split,
                limit=config.limit,
                progress=_with_rate(progress),
            )
        found = found.with_(sentences=(*said, *found.sentences))
        if config.packing and not found.refusal:
            found = found.with_(numbers=found.numbers | pack_lengths(found.lengths, max_length))
        if html is not None:
            html.write_text(write_page(found, model=config.model, data=config.data), encoding="utf-8")
        if found.refusal:
            raise InputError(found.refusal)
        keys = {
            "model": config.model,
            "data": config.data,
            **found.to_dict(),
            "html": None if html is None else str(html),
        }
        show(keys, lambda: _table(found, config.data, html))


@app.command()
def preview(
    arguments: Arguments = None,
    model: ModelFlag = None,
    data: DataFlag = None,
    count: Annotated[int, typer.Option(help="Records to show, spread over the data.")] = 3,
    as_json: output.AsJson = False,
) -> None:
    """Show a few records token by token: what carries loss, what the template adds, what is cut off."""
    with output.result(as_json, wrap=False) as show:
        config = _read(arguments or [], model, data)
        from fourbit.data.lint import preview_data
        from fourbit.train.material import settle_tokenizer

        tokenizer, max_length, _ = settle_tokenizer(config)
        shown = preview_data(
            config.data,
            tokenizer,
            count=count,
            max_length=max_length,
            loss_on=config.loss_on,
            split=config.split,
            limit=config.limit,
        )
        keys = {
            "records": [
                {"place": each.place, "tokens": [[token.id, token.text, token.kind] for token in each.tokens]}
                for each in shown
            ]
        }
        show(keys, lambda: _samples(shown))


def _read(arguments: Sequence[str], model: str | None, data: str | None) -> TrainConfig:
    """The config of a training run, whose output is not asked for."""
    from fourbit.cli.train import read_config

    given = [argument for argument in arguments if not argument.startswith("output=")]
    return read_config(given, {"model": model, "data": data, "output": "unused"}, resume=False)


def _with_rate(progress: output.Progress) -> output.Progress:
    """The same, told how fast it goes as well."""
    began: dict[str, float] = {}

    def tell(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        seconds = now - began.setdefault(what, now)
        rate = f", {done / seconds:,.0f} examples/s" if seconds > 0.5 else ""
        progress(what + rate, done, total)

    return tell


def _table(found: Lint, data: str, html: Path | None) -> RenderableType:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for check in found.checks:
        text = Text(check.finding)
        if check.advice:
            text.append(f" {check.advice}", style="dim")
        if check.places:
            text.append(f"\n{check.where}", style="dim")
        table.add_row(Text(check.verdict, style=VERDICTS[check.verdict]), Text(check.name), text)
    keys = found.to_dict()
    counts = ((keys["problems"], "problem"), (keys["notes"], "note"))
    summary = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts)
    rest: list[Any] = [Text("Lengths in tokens", style="bold"), Padding(_bars(found), (0, 0, 1, 2), expand=False)]
    if "packed_rows" in keys:
        rest.append(Text(f"Packed into {keys['packed_rows']:,} rows, filled to {keys['packed_share']:.1%}."))
    if html is not None:
        rest.append(Text(f"{html} shows samples token by token."))
    return Group(Text(f"{data}: {summary}", style="bold"), Padding(table, (0, 0, 1, 2), expand=False), *rest)


def _bars(found: Lint) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max((count for _, _, count in found.histogram), default=1)
    for low, high, count in found.histogram:
        label = f"over {low - 1:,}" if high is None else f"{low:,} to {high:,}"
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        style = "yellow" if low > found.numbers["max_length"] else "green"
        table.add_row(Text(label), Text(bar, style=style), Text(f"{count:,}"))
    return table


def _samples(shown: Sequence[Coloured]) -> RenderableType:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

    from fourbit.data.colours import KINDS_OF_TOKENS

    class Samples:
        """Colours on a terminal that has them, brackets elsewhere."""

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            coloured = console.color_system is not None
            legend = Text()
            for kind, meaning in KINDS_OF_TOKENS.items():
                opens, closes = ("", "") if coloured else MARKS[kind]
                legend.append(f"{opens}{kind}{closes}", style=STYLES[kind]).append(f"  {meaning}\n")
            yield legend
            for each in shown:
                count = f"{len(each.tokens):,} tokens, {each.count('loss'):,} with loss"
                yield Text(f"{each.place} · {count}", style="dim")
                yield _spelled(each, coloured=coloured)
                yield Text()

    return Samples()


def _spelled(sample: Coloured, *, coloured: bool) -> Text:
    from itertools import groupby

    from rich.text import Text

    text = Text()
    for kind, tokens in groupby(sample.tokens, key=lambda token: token.kind):
        opens, closes = ("", "") if coloured else MARKS[kind]
        text.append(opens)
        for number, token in enumerate(tokens):
            style = STYLES[kind] + (" underline" if coloured and number % 2 else "")
            text.append(token.text, style=style)
        text.append(closes)
    return text
