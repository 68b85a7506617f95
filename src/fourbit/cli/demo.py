"""`fourbit demo`: the whole story on the embedded base model."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import output
from fourbit.errors import InputError
from fourbit.words import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.cli.live import Watcher
    from fourbit.demo.story import Chapter, Event, Examining
    from fourbit.train.events import Event as TrainEvent

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option("--output", metavar="OUT", help="The folder to write; an earlier demo's is replaced.")
    ] = Path("fourbit-demo"),
    questions: Annotated[int, typer.Option(help="Held-out facts to ask for, before and after.")] = 320,
    seed: Annotated[int, typer.Option(help="Of the adapter's first values and the order of the examples.")] = 0,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop each training after so many steps. Default: when it is done.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; only say what would be done.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Finetune a small 4-bit model, offline, from start to end.

    A base model of some five million parameters comes with the package. It has read about a small made-up world, and
    only continues text. You see it asked, finetuned with QLoRA, asked again about facts that the finetuning did not
    touch, and compared with 16-bit LoRA. The folder keeps the data, the adapters and a report to look at.
    """
    if questions < 1:
        raise InputError(f"--questions is {questions}; it must be at least 1.")
    with output.result(as_json) as show:
        from fourbit.demo.story import outline, run_demo

        if dry_run:
            plan = outline(questions=questions)
            show(asdict(plan), lambda: output.facts(f"{out} would hold a demo", _outline_facts(asdict(plan))))
            return
        changes: dict[str, Any] = {} if max_steps is None else {"max_steps": max_steps}
        with _Teller() as teller:
            result = run_demo(out, questions=questions, seed=seed, on_event=teller, **changes)
        keys = asdict(result)
        show(keys, lambda: _table(keys))


class _Teller:
    """Shows the story on stderr: chapters as text, what goes on in between as a line that moves."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._moving = contextlib.ExitStack()
        self._watch: Watcher | None = None
        self._progress: output.Progress | None = None

    def __enter__(self) -> _Teller:
        return self

    def __exit__(self, *error: object) -> None:
        self._rest()

    def __call__(self, event: Event) -> None:
        from fourbit.demo.story import Chapter, Examining

        if isinstance(event, Chapter):
            self._rest()
            self._write(event)
        elif isinstance(event, Examining):
            self._examine(event)
        else:
            self._train(event.event)

    def _rest(self) -> None:
        """Take away the line that moves: a terminal has room for one."""
        self._moving.close()
        self._watch = self._progress = None

    def _write(self, chapter: Chapter) -> None:
        from rich.text import Text

        if chapter.title:
            self._console.print(Text(f"\n{chapter.title}", style="bold"))
        for sentence in chapter.sentences:
            self._console.print(Text(sentence), soft_wrap=True)

    def _examine(self, event: Examining) -> None:
        if self._progress is None:
            self._rest()
            self._progress = self._moving.enter_context(output.progress())
        self._progress("asking", event.done, event.total)

    def _train(self, event: TrainEvent) -> None:
        from fourbit.cli.live import Watcher

        if self._watch is None:
            self._rest()
            self._watch = self._moving.enter_context(Watcher())
        self._watch(event)


def _outline_facts(plan: dict[str, Any]) -> dict[str, str]:
    return {
        "base model": plan["model"],
        "parameters": f"{plan['parameters']:,}",
        "weights": f"{size(plan['bytes_16bit'])} → {size(plan['bytes_4bit'])} in 4 bits",
        "conversations": f"{plan['examples']:,} to learn from",
        "questions": f"{plan['questions']:,}, held out",
        "training": f"{plan['steps']:,} steps in 4 bits, and as many in 16",
    }


def _table(keys: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    table = Table(title="Held-out exact match", title_justify="left")
    for name in ("", "base, 4-bit", "QLoRA, 4-bit", "LoRA, 16-bit"):
        table.add_column(name, justify="left" if not name else "right")
    for name, key in (
        ("facts nobody asked for before", "exact_match"),
        ("strangers it admits not to know", "admitted"),
    ):
        table.add_row(name, *(f"{keys[f'{key}_{when}']:.1%}" for when in ("before", "after", "16bit")))
    rates = [keys["tokens_per_second"], keys["tokens_per_second_16bit"]]
    table.add_row("tokens/s in training", "", *("" if rate is None else f"{rate:,.0f}" for rate in rates))
    table.add_row("weights of the base", *(size(keys[f"bytes_{bits}bit"]) for bits in (4, 4, 16)))
    folder = keys["output"]
    facts = output.facts(
        f"Done in {keys['seconds']:.0f} s",
        {
            "report": keys["report"],
            "peak memory": f"{size(keys['peak_bytes'])} (nearly all of it Python and torch)",
            "talk to it": f"fourbit chat {folder}/base-nf4 --adapter {folder}/qlora",
            "train your own": "fourbit train --model MODEL --data DATA --output OUT",
        },
    )
    return Group(table, "", facts)
