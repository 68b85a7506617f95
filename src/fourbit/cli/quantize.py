"""`fourbit quantize MODEL OUT`: a 16-bit model folder into a 4-bit one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fourbit.cli import output
from fourbit.words import size

__all__ = ["quantize"]


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a name on the Hugging Face hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    format: Annotated[str, typer.Option(help="The number format: nf4, fp4, int4, nf3 or nf2.")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Elements that share a scale: a power of two.")] = 64,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Keep the scales themselves in 8 bits.")
    ] = True,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="A module to leave in 16 bits; may be repeated. Default: the output head."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch, tag or commit of a hub model.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model folder brings.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that fourbit wrote before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing; only say what would come out.")] = False,
    as_json: output.AsJson = False,
) -> None:
    """Write a model folder with its weights in 4 bits.

    It streams shard by shard, and holds about one tensor at a time. The folder loads here, and in transformers with
    bitsandbytes.
    """
    with output.result(as_json) as show:
        from fourbit.models.streaming import quantize_folder
        from fourbit.quant import QuantConfig

        config = QuantConfig(format=format, block_size=block_size, double_quant=double_quant, skip=skip)
        with output.progress() as progress:
            report = quantize_folder(
                model,
                out,
                config,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                revision=revision,
                dry_run=dry_run,
                progress=progress,
            )
        scales = ", double quantization" if double_quant else ""
        show(
            asdict(report),
            lambda: output.facts(
                f"{out} would be" if dry_run else str(out),
                {
                    "model": model,
                    "format": f"{format.upper()}, blocks of {block_size}{scales}",
                    "parameters": f"{report.parameters:,}",
                    "size": f"{size(report.bytes_before)} → {size(report.bytes_after)}",
                    "bits per parameter": f"{report.bits_per_parameter:.2f}",
                    "time": f"{report.seconds:.1f} s",
                    "peak memory": size(report.peak_rss_bytes),
                },
            ),
        )
