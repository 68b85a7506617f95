"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__: list[str] = []

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
