"""The `fourbit` command: its verbs, and the one place where an exception becomes an exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

import fourbit
from fourbit.cli import (
    agreement,
    arena,
    bench,
    chat,
    compare,
    data,
    demo,
    doctor,
    elo,
    errors,
    generate,
    judge,
    output,
    plan,
    quantize,
    train,
)
from fourbit.cli import eval as scores

__all__ = ["app", "run"]

app = typer.Typer(
    help="Large language models whose base weights are frozen in 4 bits.",
    epilog="Exit codes: 0 done, 2 the input is at fault, 130 interrupted, 1 our fault.",
    add_completion=False,
    rich_markup_mode=None,  # rich's panels leave a help text 25 columns of an 80-column terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(plan.plan)
app.command()(quantize.quantize)
app.command()(train.train)
app.add_typer(data.app, name="data")
app.command()(chat.chat)
app.command()(generate.generate)
app.command()(judge.judge)
app.command()(arena.arena)
app.command()(elo.elo)
app.command()(agreement.agreement)
app.command()(compare.compare)
app.add_typer(scores.app, name="eval")
app.command()(bench.bench)
app.command()(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fourbit {fourbit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; see `fourbit.cli.main`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not errors.debugging():
        _silence_libraries()
    if given[:1] != ["bench"]:  # which measures the peers as they come
        _wait_without_spinning()
    command = typer.main.get_command(app)
    _end_as_by_ctrl_c(signal.SIGTERM)
    try:
        # what was given is kept for a verb that has to name the command which goes on
        code = command.main(args=given or ["--help"], prog_name="fourbit", standalone_mode=False, obj=tuple(given))
    except (Exception, KeyboardInterrupt) as error:
        code, message = errors.explain(error)
        output.complain(message)
        return code
    if code == errors.INTERRUPTED:  # typer catches KeyboardInterrupt itself
        output.complain("Interrupted.")
    return code or 0


def _wait_without_spinning() -> None:
    """Let a thread that waits for another give its processor away soon, as others run on this machine, too.

    Beside one busy process the two threads of a small model took fourteen times as long without it (docs/log.md). To be
    set before torch loads its OpenMP, which is GNU's; where it is another it does nothing.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _end_as_by_ctrl_c(number: signal.Signals) -> None:
    """A scheduler's signal would otherwise end Python on the spot, and leave half a folder behind."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is signal.SIG_DFL:
        signal.signal(number, signal.default_int_handler)


def _silence_libraries() -> None:
    """Keep what a verb says apart from what the libraries under it say; FOURBIT_DEBUG=1 lets them speak."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # or Python prints the warnings of whoever has no handler
    ours, handler = logging.getLogger("fourbit"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("Warning: %(message)s"))
    ours.handlers, ours.propagate = [handler], False
