"""`fourbit eval ...`: scores of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourbit.cli import output
from fourbit.errors import InputError

if TYPE_CHECKING:
    from fourbit.evaluate import Perplexity

__all__ = ["app", "perplexity"]

app = typer.Typer(help="Score a model.")

NOT_QUANTIZED = "none"


@app.callback()
def _eval() -> None:
    pass


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a name on the Hugging Face hub.")],
    text: Annotated[Path, typer.Option(help="What to score: plain text, .jsonl, .json or .parquet.")],
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter to put on the model.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="What to quantize a 16-bit model to: nf4, fp4, int4, nf3, nf2, or none to leave it. Default: nf4;"
            " for a model in 4 bits, what it is in."
        ),
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Elements that share a scale. Default: 64.")] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="Keep the scales themselves in 8 bits. Default: yes."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="What is computed in: float32, bfloat16 or float16.")] = "bfloat16",
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: what the model was made for, 2048 at most.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens from one window to the next. Default: the sequence length, so that none overlap."),
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option(help="Score the first so many tokens only.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    separator: Annotated[
        str | None, typer.Option(help="Where plain text is split into documents. Default: the file is one document.")
    ] = None,
    field: Annotated[str, typer.Option(help="The field of a record that holds its text.")] = "text",
    revision: Annotated[str | None, typer.Option(help="The branch, tag or commit of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model folder brings.")
    ] = False,
    as_json: output.AsJson = False,
) -> None:
    """Score how well a model predicts a text.

    Each document is scored alone, after the BOS token, each token once. The perplexity is per token of the model's own
    tokenizer; bits per byte compare models with different ones.
    """
    with output.result(as_json) as show:
        from fourbit.evaluate import measure_perplexity, read_documents
        from fourbit.models.tokenizer import load_tokenizer

        documents = read_documents(text, separator=separator, field=field)
        if limit_tokens is None:
            documents = iter(list(documents))  # a bad record shall not come to light after the model was loaded
        origin: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        tokenizer = load_tokenizer(model, **origin)
        loaded, used = _load(model, format, block_size, double_quant, dtype, {"adapter": adapter, **origin})
        with output.progress() as progress:
            score = measure_perplexity(
                loaded,
                tokenizer,
                documents,
                sequence_length=sequence_length,
                stride=stride,
                limit_tokens=limit_tokens,
                batch_size=batch_size,
                progress=_with_rate(progress),
            )
        keys = _keys(score) | used | {"model": model, "adapter": adapter, "text": str(text)}
        show(keys, lambda: output.facts(f"{model} on {text.name}", _facts(keys)))


def _load(
    model: str,
    format: str | None,
    block_size: int | None,
    double_quant: bool | None,
    dtype: str,
    arguments: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """The model, and what its weights are in and computed in."""
    import torch

    import fourbit
    from fourbit.models.unquantized import load_unquantized
    from fourbit.quant.config import COMPUTE_DTYPES

    if dtype not in COMPUTE_DTYPES:
        raise InputError(f"The dtype is {dtype!r}; it must be one of {', '.join(COMPUTE_DTYPES)}.")
    settings = {"format": format, "block_size": block_size, "double_quant": double_quant}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    arguments = {"dtype": getattr(torch, dtype), **arguments}
    if format == NOT_QUANTIZED:
        if len(given) > 1:
            raise InputError("A block size and double quantization go with a format; --format none quantizes nothing.")
        unquantized = {"format": NOT_QUANTIZED, "block_size": None, "double_quant": None}
        return load_unquantized(model, **arguments), unquantized | {"dtype": dtype}
    config = fourbit.QuantConfig(**given) if given else None
    loaded = fourbit.load(model, config, **arguments)
    config = next(layer.config for layer in loaded.modules() if isinstance(layer, fourbit.nn.QuantLinear))
    used = {"format": config.format, "block_size": config.block_size, "double_quant": config.double_quant}
    return loaded, used | {"dtype": dtype}


def _with_rate(progress: output.Progress) -> Callable[[int, int], None]:
    """Progress in tokens, with how many there are in a second."""
    started = time.monotonic()

    def show(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - started, 1e-9)
        progress(f"scoring, {rate:,.0f} tokens/s", done, total)

    return show


def _keys(score: Perplexity) -> dict[str, Any]:
    from fourbit.models.process import peak_resident_bytes

    return {
        "perplexity": score.perplexity,
        "tokens": score.tokens,
        "bits_per_byte": score.bits_per_byte,
        "bytes": score.bytes,
        "documents": len(score.losses),
        "sequence_length": score.sequence_length,
        "stride": score.stride,
        "seconds": score.seconds,
        "tokens_per_second": score.tokens / score.seconds,
        "peak_rss_bytes": peak_resident_bytes(),
    }


def _facts(keys: dict[str, Any]) -> dict[str, str]:
    weights = f"{keys['dtype']}, not quantized"
    if keys["format"] != NOT_QUANTIZED:
        scales = " with double quantization" if keys["double_quant"] else ""
        weights = f"{keys['format'].upper()}, blocks of {keys['block_size']}{scales}, computed in {keys['dtype']}"
    return {
        "perplexity": f"{keys['perplexity']:.4f}",
        "bits per byte": f"{keys['bits_per_byte']:.4f}",
        "tokens": f"{keys['tokens']:,}, for {output.size(keys['bytes'])} of text",
        "documents": f"{keys['documents']:,}",
        "weights": weights,
        "windows": f"{keys['sequence_length']} tokens, {keys['stride']} from one to the next",
        "time": f"{keys['seconds']:.1f} s, {keys['tokens_per_second']:,.0f} tokens/s",
        "peak memory": output.size(keys["peak_rss_bytes"]),
    }
