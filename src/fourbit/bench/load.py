"""A 16-bit checkpoint on disk to a 4-bit model in memory: time, and the largest resident size on the way.

The checkpoint is written just before, so that it is read from the system's cache: this is about the work, not the disk.
Everybody loads a tiny checkpoint first, off the clock, so that no import is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fourbit.bench.case import OURS, Bar, Case, Contender, Measure, Task
from fourbit.bench.peers import BITSANDBYTES, bitsandbytes_model
from fourbit.models.shapes import config_of

__all__ = ["cases"]

SHARD_BYTES = 1 << 30
FULL, QUICK = "tinyllama-1.1b", "tiny"


def cases(quick: bool) -> tuple[Case, ...]:
    """Through our `load`, and through the call of transformers that both of us serve."""
    size = "tiny" if quick else "1.1 B-parameter"
    return (
        Case(
            name="load",
            title=f"load and quantize a {size} bf16 LLaMA, NF4 with double quantization",
            measure=Measure("s", 1, is_rate=False),
            contenders=(
                Contender(OURS, _ours),
                Contender(f"{OURS}, from_pretrained", _our_plugin),
                Contender(BITSANDBYTES, _bitsandbytes, needs=BITSANDBYTES),
            ),
            bars=(Bar("speed", BITSANDBYTES, 5.0), Bar("memory", BITSANDBYTES, 0.5)),
            repeats=1,
            rounds=1 if quick else 3,
            sample_s=0,
            warmup=0,
            together=False,
            tolerance=0.0,
            fixture=_write_quick if quick else _write_full,
        ),
    )


def _ours(folder: Path) -> Task:
    import torch

    import fourbit

    return _task(folder, lambda path: fourbit.load(path, fourbit.QuantConfig(), dtype=torch.bfloat16))


def _our_plugin(folder: Path) -> Task:
    import torch
    from transformers import AutoModelForCausalLM

    import fourbit

    config = fourbit.QuantConfig()
    return _task(
        folder,
        lambda path: AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16),
    )


def _bitsandbytes(folder: Path) -> Task:
    return _task(folder, bitsandbytes_model)


def _task(folder: Path, load: Callable[[Path], Any]) -> Task:
    load(folder / "warmup")
    return Task(lambda: load(folder / "model"), _code_sum)


def _code_sum(model: Any) -> float:
    """The bits have to be the same, not only the time better."""
    return float(model.model.layers[-1].mlp.down_proj.weight.sum())


def _write_full(folder: Path) -> None:
    _write(folder / "warmup", QUICK)
    _write(folder / "model", FULL)


def _write_quick(folder: Path) -> None:
    _write(folder / "warmup", QUICK)
    _write(folder / "model", QUICK)


def _write(folder: Path, shape: str) -> None:
    """A LLaMA of random weights, a shard at a time, so that the fixture itself stays small."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config: Any = config_of(shape)
    config.dtype, config.architectures = "bfloat16", ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        names: dict[str, Any] = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    homes: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    for number, (name, size) in enumerate(names.items(), start=1):
        pending[name] = torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        full = sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES
        if full or number == len(names):
            file = f"model-{number:05d}.safetensors"
            save_file(pending, folder / file, metadata={"format": "pt"})
            homes |= dict.fromkeys(pending, file)
            pending.clear()
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
