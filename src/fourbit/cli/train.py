"""`fourbit train CONFIG.yaml [key=value...]`: finetune a model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import output
from fourbit.cli.errors import Interrupted
from fourbit.errors import InputError, RunExists
from fourbit.words import size

if TYPE_CHECKING:
    from fourbit.train import TrainConfig, TrainResult

__all__ = ["read_config", "train"]


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG.yaml|KEY=VALUE",
            help="A YAML file, and keys that win over it: learning_rate=1e-4 max_steps=200 packing=true …",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model folder, or a name on the Hugging Face hub.")] = None,
    data: Annotated[str | None, typer.Option(help="A file, a folder of files, or a name on the hub.")] = None,
    out: Annotated[str | None, typer.Option("--output", help="The folder to write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left in the output.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if the memory is planned not to be enough.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; only read the data and say what would be done.")
    ] = False,
    as_json: output.AsJson = False,
) -> None:
    """Train an adapter on a model whose weights are in 4 bits.

    Writes a PEFT adapter with its tokenizer, metrics.json, report.html and checkpoints. The data may be
    conversations, prompts with completions, Alpaca or Self-Instruct records, preference pairs or plain text (.txt,
    too): it is recognised by its fields, and `fourbit data lint` judges it beforehand. The keys are those of
    transformers and trl, and a few of fourbit's own: model, data, eval_data, output, adapter, format, block_size,
    double_quant, dtype, adapter_dtype, lora_r, lora_alpha, lora_dropout, target_modules, loss_on, chat_template,
    max_length, eval_size, limit, memory, max_skipped_steps, samples. The defaults are Guanaco's.

    Ctrl-C finishes the step, saves a checkpoint and ends; --resume takes it up. A second Ctrl-C ends at once.
    """
    with output.result(as_json) as show:
        config = read_config(arguments or [], {"model": model, "data": data, "output": out}, resume=resume)
        if force:
            config = config.with_(force=True)
        from fourbit.cli.live import Watcher

        if dry_run:
            from fourbit.train.outline import outline_run

            with Watcher() as watcher:
                keys = outline_run(config, resume=resume, overwrite=overwrite, on_event=watcher)
            show(keys, lambda: output.facts(f"{config.output} would be", _outline_facts(keys)))
            return
        from fourbit.train import train as run

        try:
            with Watcher() as watcher:
                result = run(config, resume=resume, overwrite=overwrite, on_event=watcher)
        except RunExists:
            if not _wants_to_go_on(config.output):
                raise
            with Watcher() as watcher:
                result = run(config, resume=True, on_event=watcher)
        except KeyboardInterrupt:
            raise Interrupted(f"Stopped at once; {_again(config)} goes on from the newest checkpoint.") from None
        if not result.finished:
            raise Interrupted(f"Stopped after step {result.steps}; {_again(config)} goes on from there.")
        show(result.metrics, lambda: output.facts(str(result.output), _facts(result)))


def _again(config: TrainConfig) -> str:
    return f"`fourbit train --output {shlex.quote(config.output)} --resume`"


def _wants_to_go_on(folder: str) -> bool:
    """Ask whoever sits at the terminal; where nobody does, the answer is no."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(f"{folder} holds a training run already. Go on with it?", default=True, err=True)


def read_config(arguments: list[str], flags: dict[str, str | None], *, resume: bool) -> TrainConfig:
    """The config of a YAML file, of `key=value` arguments and of flags, the later ones winning.

    Where only the output of an earlier run is named, it is what that run was told.
    """
    from fourbit.train.config import TrainConfig
    from fourbit.train.folder import CONFIG_FILE
    from fourbit.train.values import parse_pairs

    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise InputError(f"There are two configs, {files[0]} and {files[1]}; give one, and single keys as key=value.")
    given = parse_pairs([argument for argument in arguments if "=" in argument])
    for name, value in flags.items():
        if value is not None and given.setdefault(name, value) != value:
            raise InputError(f"`{name}` is given twice, as --{name} {value} and {name}={given[name]}; keep one.")
    if files:
        return TrainConfig.load(files[0], given)
    earlier = Path(str(given.get("output") or "")).expanduser() / CONFIG_FILE
    if resume and given.get("output") and earlier.is_file():
        return TrainConfig.load(earlier, given)
    return TrainConfig.from_mapping(given, source="The command")


def _facts(result: TrainResult) -> dict[str, str]:
    from fourbit.train.report import model_arguments

    keys = result.metrics
    before = keys["eval_loss_before"]
    rows = {"steps": f"{result.steps:,}, {result.tokens:,} tokens, {keys['epochs']:.2f} epochs"}
    if result.train_loss is not None:
        rows["training loss"] = f"{result.train_loss:.4f}"
    if result.eval_loss is not None:
        rows["evaluation loss"] = f"{'' if before is None else f'{before:.4f} → '}{result.eval_loss:.4f}"
    if keys.get("eval_mmlu") is not None:
        rows["MMLU"] = f"{keys['eval_mmlu']:.2%}"
    if result.tokens_per_second is not None:
        rows["speed"] = f"{result.tokens_per_second:,.0f} tokens/s"
    planned = "" if result.planned_bytes is None else f", {size(result.planned_bytes)} planned"
    rows["peak memory"] = size(result.peak_bytes) + planned
    rows["report"] = str(result.output / keys["report"])
    rows["talk to it"] = f"fourbit chat {model_arguments(keys['config'])}"
    return rows


def _outline_facts(keys: dict[str, Any]) -> dict[str, str]:
    if keys["finished"]:
        return {"steps": "none; the run there finished already"}
    held_out = f", {keys['eval_examples']:,} held out" if keys["eval_examples"] else ""
    dropped = f", {keys['dropped_records']:,} records dropped" if keys["dropped_records"] else ""
    return {
        "examples": f"{keys['examples']:,}{held_out}{dropped}",
        "tokens": f"{keys['tokens']:,} in one pass, {keys['labelled_tokens']:,} of them with loss",
        "longest": f"{keys['longest']:,} tokens; {keys['max_length']:,} are allowed",
        "steps": f"{keys['steps']:,}",
        "planned peak memory": "unknown" if keys["planned_bytes"] is None else size(keys["planned_bytes"]),
        "parameters": f"{keys['trainable_parameters']:,} trained, of a model with {keys['parameters']:,}",
    }
