"""The plan of memory beside `max_memory_allocated` of real training steps on a GPU, over a grid.

Models have random weights, made in 4 bits where they are to live; nothing is downloaded. Each row trains two steps. The
bar: the plan is not below what was allocated, and not more than 3% above. The context is reported apart: what the
driver says is used, less what torch reserved.

    python benchmarks/plan_gpu.py [--shapes llama-7b,llama-13b] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

BAR = 0.03
STEPS = 2
GRID: tuple[dict[str, Any], ...] = (
    {"batch_size": 1, "sequence_length": 512, "adapter_dtype": "bfloat16"},
    {"batch_size": 1, "sequence_length": 512, "adapter_dtype": "float32"},
    {"batch_size": 16, "sequence_length": 512, "adapter_dtype": "bfloat16"},
    {"batch_size": 4, "sequence_length": 2048, "adapter_dtype": "bfloat16", "rank": 16},
    {"batch_size": 4, "sequence_length": 512, "adapter_dtype": "bfloat16", "dropout": 0.1},
    {"batch_size": 2, "sequence_length": 512, "adapter_dtype": "bfloat16", "checkpointing": False},
    {"batch_size": 16, "sequence_length": 512, "adapter_dtype": "bfloat16", "checkpointing": "offload"},
    {"batch_size": 1, "sequence_length": 512, "adapter_dtype": "bfloat16", "accumulation": 2},
)


def main() -> int:
    """Measure and print; the exit code is 1 if a row misses the bar, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tinyllama-1.1b,llama-7b,qwen3-4b,llama-33b", help="names, by commas")
    parser.add_argument("--json", type=Path, help="where the rows go")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("There is no GPU that torch can use here.", file=sys.stderr)
        return 2
    rows = [_row(shape, knobs) for shape in arguments.shapes.split(",") for knobs in GRID]
    if arguments.json:
        from fourbit.bench import environment

        result = {"bar": BAR, "environment": environment.facts(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(row["error"] is not None and not 0 <= row["error"] <= BAR for row in rows))


def _row(shape: str, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from fourbit.memory.plan import plan

    planned = plan(shape, **settings, device="cuda")
    row: dict[str, Any] = {"shape": shape, **settings, "planned_bytes": planned.total_bytes, "error": None}
    row["parts"] = dict(planned.parts)
    try:
        row |= _measured(shape, planned.knobs)
        row["error"] = round(planned.total_bytes / row["measured_bytes"] - 1, 4)
    except torch.OutOfMemoryError:
        row["remark"] = "out of memory"
    told = "out of memory" if row["error"] is None else f"{row['error']:+.1%}"
    print(f"{told:>8}  planned {planned.total_bytes / 1e9:.2f} GB  {shape} {settings}", flush=True)
    return row


def _measured(shape: str, knobs: Any) -> dict[str, int]:
    import peft
    import torch

    import fourbit
    from fourbit.models.shapes import random_model

    gc.collect()
    torch.cuda.empty_cache()
    dtype = getattr(torch, knobs.dtype)
    model: Any = random_model(shape, fourbit.QuantConfig(), device="cuda", dtype=dtype)
    fourbit.prepare(model, gradient_checkpointing=knobs.checkpointing)
    lora = peft.LoraConfig(
        r=knobs.rank, lora_alpha=16, lora_dropout=knobs.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(getattr(torch, knobs.adapter_dtype))
    model.train()
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        for _ in range(knobs.accumulation):
            ids = torch.randint(0, model.config.vocab_size, (knobs.batch_size, knobs.sequence_length), device="cuda")
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return {
        "measured_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "context_bytes": total - free - torch.cuda.memory_reserved(),
    }


if __name__ == "__main__":
    sys.exit(main())
