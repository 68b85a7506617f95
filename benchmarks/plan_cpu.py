"""The plan of memory beside the peak resident size of real training steps on the CPU, over a grid.

Each row is a process of its own: it loads a model with random weights from a folder, prepares it, puts an adapter on it
and trains four steps, as a user's own loop would. The plan is made without that process, with what it held after its
imports as the part of Python and libraries. The same run twice does not have the same peak, as the threads of oneDNN
and the C library's heap meet differently; so each is run several times, and the median counts. The bar is a tenth.

    python benchmarks/plan_cpu.py [--only NAME] [--repeats 3] [--write]

`--write` leaves benchmarks/results/plan_cpu.json and the table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plan_cpu.json"
PAGE = ROOT / "docs" / "memory.md"
BEGIN, END = "<!-- written by benchmarks/plan_cpu.py -->", "<!-- end -->"
BAR = 0.10
STEPS = 4

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8m": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
        "vocab_size": 4000, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    },
    "llama-25m": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "qwen3-40m": {
        "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 20_000,
        "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Small models; the others are named in `fourbit.models.shapes`."""


@dataclass(frozen=True)
class Row:
    """One process: a shape, a batch, a length, and what differs from the defaults of `fourbit.plan`."""

    shape: str
    batch_size: int
    sequence_length: int
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people."""
        others = " ".join(f"{key}={value}" for key, value in self.knobs.items())
        return f"{self.shape} {self.batch_size} × {self.sequence_length} {others}".strip()


def _row(shape: str, batch_size: int, sequence_length: int, **knobs: Any) -> Row:
    return Row(shape, batch_size, sequence_length, knobs)


BF16 = {"adapter_dtype": "bfloat16"}
QUICK = (
    _row("llama-8m", 2, 64, rank=8),
    _row("llama-8m", 8, 1024, rank=8, checkpointing=False),
    _row("llama-25m", 4, 512, rank=16, checkpointing=False, dtype="float32"),
    _row("llama-135m", 4, 256, rank=16, **BF16),
)
"""What the test of this plan runs."""

GRID = (
    *QUICK,
    _row("llama-8m", 16, 512, rank=64),
    _row("llama-25m", 1, 2048, rank=64),
    _row("llama-25m", 4, 512, rank=16, checkpointing=False),
    _row("llama-25m", 8, 512, rank=16, dropout=0.1),
    _row("llama-25m", 16, 512, rank=16),
    _row("qwen3-40m", 4, 512, rank=32),
    _row("qwen3-40m", 4, 512, rank=32, checkpointing=False, **BF16),
    _row("llama-135m", 1, 128),
    _row("llama-135m", 4, 256, rank=16, checkpointing=False, **BF16),
    _row("llama-135m", 4, 256, rank=16, checkpointing=False, format="none", **BF16),
    _row("llama-135m", 2, 512, checkpointing=False, dropout=0.1, block_size=128, double_quant=False),
    _row("llama-135m", 8, 512, dropout=0.1, accumulation=2),
    _row("llama-135m", 2, 256, rank=16, target_modules=("q_proj", "v_proj"), checkpointing=False),
)


def main() -> int:
    """Measure and print; the exit code is 1 if a row misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose name holds this text")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each row")
    parser.add_argument("--write", action="store_true", help="leave the rows, and their table in the docs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_train(**json.loads(arguments.worker))))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="fourbit-plan-") as folder:
        for row in GRID:
            if arguments.only and arguments.only not in row.name:
                continue
            found = measure(row, Path(folder), repeats=arguments.repeats)
            rows.append(found)
            peaks = ", ".join(f"{peak / 1e6:,.0f}" for peak in sorted(found["peaks"]))
            print(f"{found['error']:+6.1%}  planned {found['planned_bytes'] / 1e6:7,.0f} MB, measured"
                  f" {found['measured_bytes'] / 1e6:7,.0f} ({peaks})  {row.name}", flush=True)  # fmt: skip
    if arguments.write:
        from fourbit.bench import environment

        result = {"bar": BAR, "steps": STEPS, "environment": environment.facts(), "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_table(page, result), encoding="utf-8")
    return int(any(abs(row["error"]) > BAR for row in rows))


def with_table(page: str, result: dict[str, Any]) -> str:
    """The page, with the rows in place of what stood between its marks."""
    lines = ["| shape, batch × length | planned, MB | measured, MB | of its runs | |", "|---|---:|---:|---:|---:|"]
    for row in result["rows"]:
        peaks = sorted(peak / 1e6 for peak in row["peaks"])
        lines.append(
            f"| {row['name']} | {row['planned_bytes'] / 1e6:,.0f} | {row['measured_bytes'] / 1e6:,.0f}"
            f" | {peaks[0]:,.0f} to {peaks[-1]:,.0f} | {row['error']:+.1%} |"
        )
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}"


def measure(row: Row, folder: Path, *, repeats: int = 1) -> dict[str, Any]:
    """Train in processes of its own, then plan.

    Args:
        folder: where models are written, once each.
        repeats: processes, one after another.
    """
    from fourbit.memory.plan import Planner

    model = _model_folder(row.shape, folder)
    told = {"folder": str(model), "batch_size": row.batch_size, "sequence_length": row.sequence_length, **row.knobs}
    command = [sys.executable, __file__, "--worker", json.dumps(told)]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
        if done.returncode:
            raise RuntimeError(f"{row.name} failed: {done.stderr.strip()[-500:]}")
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    peak = statistics.median(run["peak"] for run in runs)
    knobs = knobs_of(row)
    plan = Planner(model, process_bytes=round(statistics.median(run["imports"] for run in runs))).plan(knobs)
    return {
        "name": row.name,
        "knobs": knobs.to_dict(),
        "planned_bytes": plan.total_bytes,
        "measured_bytes": peak,
        "peaks": [run["peak"] for run in runs],
        "error": round(plan.total_bytes / peak - 1, 4),
        "parts": dict(plan.parts),
        "threads": runs[0]["threads"],
    }


def knobs_of(row: Row) -> Any:
    """As a plan takes them."""
    from fourbit.memory.knobs import Knobs

    return Knobs(batch_size=row.batch_size, sequence_length=row.sequence_length, device="cpu", **row.knobs)


def _model_folder(shape: str, folder: Path) -> Path:
    from transformers import AutoConfig

    from fourbit.models.shapes import random_model

    path = folder / shape
    if not path.exists():
        settings = dict(SHAPES.get(shape, {}))
        model_type = settings.pop("model_type", "llama")
        config = AutoConfig.for_model(model_type, **settings) if settings else shape
        random_model(config, None).save_pretrained(path)
    return path


def _train(
    *,
    folder: str,
    batch_size: int,
    sequence_length: int,
    rank: int = 64,
    target_modules: Any = "all-linear",
    dropout: float = 0.0,
    accumulation: int = 1,
    adapter_dtype: str = "float32",
    dtype: str = "bfloat16",
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    checkpointing: bool = True,
) -> dict[str, Any]:
    """Four steps, in this process: what it held after its imports and at its peak."""
    import peft
    import torch
    import transformers

    import fourbit
    import fourbit.models.loading
    from fourbit.memory.process import resident_bytes
    from fourbit.models.process import peak_resident_bytes

    del transformers
    imports = resident_bytes()
    compute = getattr(torch, dtype)
    if format == "none":
        from fourbit.models.unquantized import load_unquantized

        model: Any = load_unquantized(folder, dtype=compute)
    else:
        config = fourbit.QuantConfig(format=format, block_size=block_size, double_quant=double_quant)
        model = fourbit.load(folder, config, dtype=compute)
    fourbit.prepare(model, gradient_checkpointing=checkpointing)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    lora = peft.LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(getattr(torch, adapter_dtype))
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for _ in range(accumulation):
            ids = torch.randint(0, model.config.vocab_size, (batch_size, sequence_length), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            del loss
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return {"imports": imports, "peak": peak_resident_bytes(), "threads": torch.get_num_threads()}


if __name__ == "__main__":
    sys.exit(main())
