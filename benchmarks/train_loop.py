"""What `fourbit train` costs beyond the bare loop: the same step of a 135.5 M LLaMA, through the verb and by hand.

Both train rank-16 adapters in bf16 on every linear layer, on 4 x 256 tokens a step without padding, with fused AdamW.
Each round runs both, each as a process of its own; the rate leaves out the first two steps, as `fourbit train` reports
it.

    python benchmarks/train_loop.py [--checkpointing] [--steps 10] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, TOKENS, VOCABULARY, RANK = 4, 256, 32_000, 16
WARM_UP_STEPS = 2


def write_model(folder: Path) -> None:
    """A LLaMA of random weights whose tokenizer makes one token of each word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>"])}
    words |= {f"w{number}": number for number in range(len(words), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_texts(path: Path, count: int) -> None:
    """Texts of more words than a row has tokens, so that each fills one."""
    draw = random.Random(0)
    texts = (" ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(TOKENS + 50)) for _ in range(count))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def run_loop(folder: Path, arguments: argparse.Namespace) -> float:
    """Tokens a second of the loop that a user would write."""
    import torch
    from peft import LoraConfig, get_peft_model

    import fourbit

    model = fourbit.load(folder / "model", dtype=torch.bfloat16)
    model = fourbit.prepare(model, gradient_checkpointing=arguments.checkpointing)
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)
    generator, seconds = torch.Generator().manual_seed(0), 0.0
    for step in range(arguments.steps):
        started = time.perf_counter()
        ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARM_UP_STEPS:
            seconds += time.perf_counter() - started
    return BATCH * TOKENS * (arguments.steps - WARM_UP_STEPS) / seconds


def run_train(folder: Path, arguments: argparse.Namespace) -> float:
    """Tokens a second that a run reports of itself."""
    from fourbit.train import TrainConfig, train

    config = TrainConfig(
        model=str(folder / "model"),
        data=str(folder / "texts.jsonl"),
        output=str(folder / "out"),
        adapter_dtype="bfloat16",
        lora_r=RANK,
        lora_dropout=0.0,
        max_length=TOKENS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        gradient_checkpointing=arguments.checkpointing,
        max_steps=arguments.steps,
        eval_size=0,
        samples=0,
    )
    rate = train(config, overwrite=True).tokens_per_second
    assert rate is not None
    return rate


CONTENDERS = {"raw loop": run_loop, "fourbit train": run_train}


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> float:
    """One contender in a process of its own."""
    flags = ["--contender", name, "--folder", str(folder), "--steps", str(arguments.steps)]
    flags += ["--checkpointing"] * arguments.checkpointing
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the rates, and their ratio in each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        print(CONTENDERS[arguments.contender](arguments.folder, arguments))
        return
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        write_texts(folder / "texts.jsonl", BATCH * arguments.steps)
        for _ in range(arguments.rounds):
            for contender, found in rates.items():
                found.append(measure(contender, folder, arguments))
                print(f"{contender}: {found[-1]:.1f} tokens/s", flush=True)
    ratios = [ours / raw for raw, ours in zip(rates["raw loop"], rates["fourbit train"], strict=True)]
    print(
        f"fourbit train / raw loop: {statistics.median(ratios):.3f} (rounds: {', '.join(f'{r:.3f}' for r in ratios)})"
    )
    row: dict[str, Any] = {"checkpointing": arguments.checkpointing, "steps": arguments.steps}
    if arguments.json:
        arguments.json.write_text(json.dumps({**row, "tokens_per_second": rates, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
