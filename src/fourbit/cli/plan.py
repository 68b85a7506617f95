"""`fourbit plan MODEL`: what finetuning will hold in memory, and what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import options, output
from fourbit.errors import InputError
from fourbit.words import parse_size, size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fourbit.memory.knobs import Knobs
    from fourbit.memory.plan import Plan

__all__ = ["plan"]

BAR = 32
"""Characters of the longest bar."""


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|CONFIG.yaml",
            help="A model folder, its config.json, a name on the Hugging Face hub, a shape such as llama-7b, or the"
            " YAML file of a run.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Keys of `fourbit train`: per_device_train_batch_size=8 max_length=2048 lora_r=16 …",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="What there is: 24GB, 24GiB, 0.5T. Default: what this machine has.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: what this machine has.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="For per_device_train_batch_size.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="For max_length.")] = None,
    rank: Annotated[int | None, typer.Option(help="For lora_r.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens, where they are not those of the model.")] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: output.AsJson = False,
) -> None:
    """Tell what memory finetuning a model would take, part by part.

    No weight is read. Says what the largest batch and the longest sequences are that fit, and where nothing fits, which
    keys to add to `fourbit train` so that it does. On a CPU it is the resident size of the process, Python and
    libraries included; on a GPU what torch allocates, and beside it what the driver takes.
    """
    with output.result(as_json, wrap=False) as show:  # flags to copy are not to be broken
        short = {"per_device_train_batch_size": batch_size, "max_length": sequence_length, "lora_r": rank}
        given = {**_pairs(arguments or [], short), **{key: value for key, value in short.items() if value is not None}}
        if memory is not None:
            parse_size(memory, "--memory")
            given["memory"] = memory
        if revision is not None:
            given["revision"] = revision
        if trust_remote_code:
            given["trust_remote_code"] = True
        config = _config(model, given)
        from fourbit.memory.plan import Planner
        from fourbit.train.planning import knobs_of, machine_bytes

        knobs = knobs_of(config, device=device).with_(vocabulary=vocabulary)
        elsewhere = knobs.device != knobs_of(config).device
        there = config.memory_bytes if memory or elsewhere else machine_bytes(config)
        planner = Planner(config.model, trust_remote_code=config.trust_remote_code, revision=config.revision)
        made = planner.plan(_within(planner, knobs, asked=config.max_length is not None))
        keys = {**made.to_dict(), **_advice(planner, made, there)}
        show(keys, lambda: _table(made, keys))


def _pairs(arguments: list[str], short: dict[str, int | None]) -> dict[str, Any]:
    from fourbit.train.values import parse_pairs

    for argument in arguments:
        if "=" not in argument:
            raise InputError(f"{argument!r} is no key of `fourbit train`; give KEY=VALUE, such as lora_r=16.")
    given = parse_pairs(arguments)
    for key, value in short.items():
        if value is not None and given.get(key, value) != value:
            raise InputError(f"`{key}` is given twice, as {given[key]} and {value}; keep one.")
    return given


def _config(model: str, given: dict[str, Any]) -> Any:
    """What `fourbit train` would be told; data and output do not matter to a plan."""
    from fourbit.train.config import TrainConfig

    path = Path(model).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return TrainConfig.load(path, {"data": "-", "output": "-", **given})
    return TrainConfig.from_mapping({"data": "-", "output": "-", **given, "model": model}, source="The command")


def _within(planner: Any, knobs: Knobs, *, asked: bool) -> Knobs:
    """The usual length, or what the model was made for if that is less, as `fourbit train` has it."""
    longest = planner.longest
    if asked or longest is None or knobs.sequence_length <= longest:
        return knobs
    return knobs.with_(sequence_length=longest)


def _advice(planner: Any, plan: Plan, memory_bytes: int | None) -> dict[str, Any]:
    from fourbit.memory import advice

    found: dict[str, Any] = {"memory_bytes": memory_bytes, "fits": None, "suggestion": None}
    found |= {"suggested_bytes": None, "largest_batch_size": None, "largest_sequence_length": None}
    if memory_bytes is None:
        return found
    found["fits"] = plan.fits(memory_bytes)
    if not found["fits"]:
        change = advice.cheapest_change(planner, plan.knobs, memory_bytes)
        if change is not None:
            found |= {"suggestion": str(change), "suggested_bytes": change.plan.needed_bytes}
    found["largest_batch_size"] = advice.largest_batch(planner, plan.knobs, memory_bytes)
    found["largest_sequence_length"] = advice.largest_length(planner, plan.knobs, memory_bytes)
    return found


def _table(plan: Plan, keys: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from fourbit.memory.plan import PARTS

    knobs = plan.knobs
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True, min_width=20)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    rows = [(PARTS[name], count) for name, count in plan.parts.items() if count]
    most = max(count for _, count in rows)
    for name, count in rows:
        table.add_row(name, size(count), Text("█" * max(1, round(BAR * count / most)) if count else "", style="blue"))
    table.add_row(Text("peak", style="bold"), Text(size(plan.total_bytes), style="bold"), "")
    if plan.context_bytes:
        table.add_row("with the context", size(plan.needed_bytes), "and what the allocator cannot fill")
    if plan.host_bytes:
        table.add_row("on the host", size(plan.host_bytes), "pinned")
    checkpointing = {True: "checkpointing", False: "no checkpointing", "offload": "checkpoints on the host"}
    title = (
        f"{plan.model} on {'a GPU' if knobs.device == 'cuda' else 'a CPU'}: {knobs.batch_size} ×"
        f" {knobs.sequence_length:,} tokens, r = {knobs.rank}, {checkpointing[knobs.checkpointing]}"
    )
    return Group(
        Text(title, style="bold"),
        table,
        *(Text(line, style=style) for line, style in _sentences(keys)),
        "",
    )


def _sentences(keys: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of the memory at hand, and how it is coloured."""
    memory = keys["memory_bytes"]
    if memory is None:
        return [("Give --memory to see what would fit.", "")]
    lines = []
    if keys["fits"]:
        lines.append((f"It fits into {size(memory)}.", "green"))
    elif keys["suggestion"] is None:
        lines.append((f"It does not fit into {size(memory)}, and no setting makes it; take a smaller model.", "red"))
    else:
        needs = size(keys["suggested_bytes"])
        lines.append((f"It does not fit into {size(memory)}. Add to `fourbit train`, for {needs}:", "red"))
        lines.append((f"  {keys['suggestion']}", "bold"))
    knobs = keys["knobs"]
    batch, length = keys["largest_batch_size"], keys["largest_sequence_length"]
    if batch:
        lines.append((f"The largest batch of {knobs['sequence_length']:,} tokens: {batch:,}.", ""))
    if length:
        lines.append((f"The longest sequences in a batch of {knobs['batch_size']}: {length:,} tokens.", ""))
    return lines
