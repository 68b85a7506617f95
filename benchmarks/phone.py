"""Finetuning in the memory of a phone: a LLaMA of 1.1 B parameters on the CPU in 2 GiB, Python and libraries included.

QLoRA's authors estimated that a phone could finetune on three million words a night while it charges. This measures the
part of that which a computer can tell: whether the whole process stays within 2 GiB of resident memory, and how many
tokens it learns from in eight hours on the machine at hand.

NF4 with double quantization, rank-16 adapters on every linear layer, gradient checkpointing, one sequence a step. The
weights are random, made directly in 4 bits: nothing is downloaded, and neither speed nor memory depends on them.
Embeddings and head stay in bf16 (262 MB). Memory by the system's own count of the peak, VmHWM.

    python benchmarks/phone.py [--steps 8] [--tokens 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SHAPE, RANK = "tinyllama-1.1b", 16
LIMIT_BYTES = 2 << 30
NIGHT_S = 8 * 3600
WORDS_PER_TOKEN = 0.75
"""Of English text under LLaMA's tokenizer; the usual rule of thumb."""

ESTIMATED_WORDS = 3_000_000
"""A night on an iPhone 12 Plus, arXiv:2305.14314, section 7."""

WARM_UP_STEPS = 2
M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


def main() -> int:
    """Train and print; the exit code is 1 if the memory was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help=f"the first {WARM_UP_STEPS} are not timed")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    result = measure(arguments.steps, arguments.tokens)
    for name, size in result["resident_bytes"].items():
        print(f"resident after {name}: {size / (1 << 20):,.0f} MiB", file=sys.stderr)
    print(
        f"peak resident memory {result['peak_rss_bytes'] / (1 << 20):,.0f} MiB of {LIMIT_BYTES / (1 << 20):,.0f};"
        f" {result['tokens_per_second']:.1f} tokens/s: {result['tokens_per_night'] / 1e6:.2f} million tokens in eight"
        f" hours, about {result['words_per_night'] / 1e6:.2f} million words (estimated for a phone: 3 million)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(result["peak_rss_bytes"] > LIMIT_BYTES)


def measure(steps: int, tokens: int) -> dict[str, Any]:
    """Memory and speed of a run."""
    resident = {}
    import torch
    from peft import LoraConfig, get_peft_model

    import fourbit
    from fourbit.bench import environment
    from fourbit.models.process import peak_resident_bytes
    from fourbit.models.shapes import random_model

    resident["imports"] = resident_bytes()
    # Drawing a weight takes buffers that glibc would keep in its heap, as large as the model in the end; loading one
    # from a file does not.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    model: Any = random_model(SHAPE, fourbit.QuantConfig(), dtype=torch.bfloat16)
    resident["the model"] = resident_bytes()
    model = fourbit.prepare(model, gradient_checkpointing=True)
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    resident["the adapter"] = resident_bytes()
    generator, seconds, losses = torch.Generator().manual_seed(0), list[float](), list[float]()
    for _ in range(steps):
        ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=generator)
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    resident["the steps"] = resident_bytes()
    rate = tokens / statistics.median(seconds[WARM_UP_STEPS:] or seconds)
    return {
        "shape": SHAPE,
        "parameters": sum(p.numel() for p in parameters) + 1_100_048_384,
        "trained": sum(parameter.numel() for parameter in parameters),
        "rank": RANK,
        "tokens": tokens,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "resident_bytes": resident,
        "peak_rss_bytes": peak_resident_bytes(),
        "step_seconds": seconds,
        "losses": losses,
        "tokens_per_second": rate,
        "tokens_per_night": rate * NIGHT_S,
        "words_per_night": rate * NIGHT_S * WORDS_PER_TOKEN,
        "run": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": environment.commit(),
        "cpu": environment.cpu_name(),
        "cores": environment.cores(),
        **environment.versions(),
    }


def resident_bytes() -> int:
    """What this process holds now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    sys.exit(main())
