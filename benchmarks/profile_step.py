"""Where the time of one CPU training step goes.

A LLaMA of 135.5 M parameters (hidden 1024, MLP 2816, 8 layers, 16 heads, vocabulary 32,000, tied embeddings), LoRA of
rank 16 on every linear layer, 4 x 256 random tokens, bf16, AdamW. Prints the median step and the operations that took
the most time, forward and backward.

    python benchmarks/profile_step.py [--base 4bit|16bit] [--checkpointing] [--unprepared] [--steps 8] [--no-profile]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import fourbit

BATCH, TOKENS, VOCABULARY = 4, 256, 32_000


def build(arguments: argparse.Namespace) -> nn.Module:
    """The model with its adapters, as a user of fourbit would make it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if arguments.base == "4bit":
        fourbit.quantize_module(model, skip=["lm_head"])
    if not arguments.unprepared:
        fourbit.prepare(model, gradient_checkpointing=arguments.checkpointing)
        print(model.fourbit_prepared)
    elif arguments.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    return model.train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    """Forward, backward, update."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=["4bit", "16bit"], default="4bit")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--unprepared", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--no-profile", action="store_true")
    arguments = parser.parse_args()
    model = build(arguments)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(arguments.steps):
        ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=generator)
        start = time.perf_counter()
        loss = step(model, optimizer, ids)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"loss {loss:.4f}, {median:.3f} s a step, {BATCH * TOKENS / median:.0f} tokens/s, "
        f"resident {resident:.0f} MB, at most {peak:.0f}"
    )
    print(" ".join(f"{x:.3f}" for x in seconds))
    if not arguments.no_profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(model, optimizer, ids)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))


if __name__ == "__main__":
    main()
