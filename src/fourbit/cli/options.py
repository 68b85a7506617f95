"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fourbit.errors import InputError

__all__ = ["assignments", "named"]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a name on the Hugging Face hub.")]
Adapter = Annotated[
    str | None,
    typer.Option(help="A PEFT adapter to put on the model; its tokenizer and template are taken where it has them."),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="What to quantize a 16-bit model to: nf4, fp4, int4, nf3, nf2, or none to leave it. Default: nf4; for a"
        " model in 4 bits, what it is in."
    ),
]
BlockSize = Annotated[int | None, typer.Option(help="Elements that share a scale. Default: 64.")]
DoubleQuant = Annotated[
    bool | None,
    typer.Option("--double-quant/--no-double-quant", help="Keep the scales themselves in 8 bits. Default: yes."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="What is computed in: float32, bfloat16 or float16. Default: float32 on a CPU, 16 bits on a GPU."
    ),
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="The name of a chat template to use in place of the tokenizer's own.")
]
System = Annotated[str | None, typer.Option(help="What the system says at the beginning of a conversation.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the likeliest token each time; the higher, the more is left to chance.")
]
TopK = Annotated[int, typer.Option(help="Draw only from so many of the likeliest tokens; 0: from all.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A text that ends an answer; may be repeated.")]
Revision = Annotated[str | None, typer.Option(help="The branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model folder brings.")
]
Ratings = Annotated[list[Path], typer.Argument(metavar="RATINGS...", help="Files of ratings, or folders of them.")]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", metavar="OLD=NEW", help="What to call a model that the ratings call OLD; may be repeated."),
]
Answers = Annotated[
    list[Path] | None,
    typer.Option(
        help="Answers with ids, which tell whose answer was shown first where only the name of a file does."
        " Seldom needed; may be repeated."
    ),
]
Samples = Annotated[int, typer.Option(help="Resamples of the prompts for the intervals.")]


def named(given: str) -> tuple[str | None, str]:
    """NAME=PATH as its two parts; a path alone has no name."""
    name, equals, path = given.partition("=")
    return (name, path) if equals and name and path and "/" not in name else (None, given)


def assignments(given: list[str] | None, option: str) -> dict[str, str]:
    """What a repeated KEY=VALUE says.

    Raises:
        InputError: one is none, or a key comes twice.
    """
    found: dict[str, str] = {}
    for one in given or ():
        key, equals, value = one.partition("=")
        if not equals or not key or not value:
            raise InputError(f"{option} is {one!r}; give it as OLD=NEW, two names with an equals sign between.")
        if key in found:
            raise InputError(f"{option} is given twice for {key!r}.")
        found[key] = value
    return found
