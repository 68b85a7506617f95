"""Text written by a model on the CPU: greedy, one token after another, at batch 1 and 8, with an adapter and without.

All contenders continue the same random prompts by the same number of tokens with one LLaMA. What a token needs at least
is one reading of all weights; the share of the bandwidth counts that. Prompts are on the clock, too, but short.

    fourbit            `fourbit.generate`'s loop, on a model as `load_for_generation` gives it, bf16
    bitsandbytes       transformers' `generate` over its layers in `eval()`, which take its packed kernel
    transformers       its `generate` in bf16, without 4 bits
    llama_cpp          its greedy loop over the same weights in Q4_0, head in bf16; one row, without an adapter
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fourbit.bench.case import OURS, Bar, Case, Contender, Measure, Share, Task
from fourbit.bench.device.cases import decode_weight_bytes
from fourbit.bench.machine import READ, read_limit
from fourbit.bench.peers import BITSANDBYTES, LLAMA_CPP, bitsandbytes_model
from fourbit.bench.step import FULL, QUICK, RANK, _sixteen_bit, _write_full, _write_quick
from fourbit.models.shapes import Shape, shape_of

__all__ = ["cases"]

BATCHES = (1, 8)
PROMPT, TOKENS = 16, 128


def cases(quick: bool) -> tuple[Case, ...]:
    """One case per batch, with an adapter and without."""
    return tuple(_case(quick, batch, adapter=adapter) for batch in BATCHES for adapter in (False, True))


def _case(quick: bool, batch: int, *, adapter: bool) -> Case:
    name, tokens = (QUICK, 4) if quick else (FULL, TOKENS)
    setup = _Setup(batch, tokens, adapter)
    share = Share(READ, tokens * _weight_bytes(shape_of(name), adapter) / 1e9)
    bars: tuple[Bar, ...] = (Bar("speed", BITSANDBYTES, 2.0),) if batch == 1 else ()
    return Case(
        name=f"decode-{batch}{'-lora' if adapter else ''}",
        title=f"write {tokens} tokens, {'tiny' if quick else '135.5 M'} LLaMA, batch {batch}"
        + (f", rank-{RANK} adapter" if adapter else ""),
        measure=Measure("tokens/s", batch * tokens),
        contenders=(
            Contender(OURS, setup.ours, share=share),
            Contender(BITSANDBYTES, setup.bitsandbytes, needs=BITSANDBYTES),
            Contender("transformers, bf16", setup.transformers),
            *([Contender(LLAMA_CPP, setup.llama_cpp, needs=LLAMA_CPP)] if batch == 1 and not adapter else []),
            read_limit(1 << 20 if quick else 1 << 30),
        ),
        bars=bars,
        repeats=1 if quick else 7,
        sample_s=0,
        warmup=0 if quick else 1,
        # How much was written is compared, and not what: random weights make ties that a rounding decides.
        tolerance=0.0,
        fixture=_write_quick if quick else _write_full,
    )


def _weight_bytes(shape: Shape, adapter: bool) -> float:
    """What one step has to read: the layers in 4 bits, the head, and the adapter, in bf16."""
    hidden, inner = shape.settings["hidden_size"], shape.settings["intermediate_size"]
    sides = 4 * (hidden + hidden) + 3 * (hidden + inner)
    lora = shape.settings["num_hidden_layers"] * 2 * RANK * sides if adapter else 0
    return float(decode_weight_bytes(shape, four_bits=True) + lora)


class _Setup:
    """The contenders of one case."""

    def __init__(self, batch: int, tokens: int, adapter: bool) -> None:
        self.batch, self.tokens, self.adapter = batch, tokens, adapter

    def ours(self, folder: Path) -> Task:
        import torch

        import fourbit
        from fourbit.generate import Sampling
        from fourbit.generate.decode import decode
        from fourbit.models.prepare import fuse_modules

        model = self._adapted(fourbit.load(folder, fourbit.QuantConfig(), dtype=torch.bfloat16))
        fuse_modules(model)
        prompts = self._prompts(model).tolist()
        keys = [str(row) for row in range(self.batch)]
        tokenizer: Any = None  # for stop strings alone
        settings = Sampling()
        return Task(
            lambda: list(decode(model, prompts, settings=settings, keys=keys, most=self.tokens, tokenizer=tokenizer)),
            lambda made: float(sum(map(len, made))),
        )

    def bitsandbytes(self, folder: Path) -> Task:
        return self._of_transformers(bitsandbytes_model(folder))

    def transformers(self, folder: Path) -> Task:
        return self._of_transformers(_sixteen_bit(folder))

    def llama_cpp(self, folder: Path) -> Task:
        import torch

        from fourbit.bench.llama_cpp import load_llama, write_gguf, write_greedily

        generator = torch.Generator().manual_seed(0)
        llama = load_llama(write_gguf(folder), PROMPT + self.tokens)
        prompt = torch.randint(3, llama.n_vocab(), (PROMPT,), generator=generator).tolist()
        return Task(lambda: write_greedily(llama, prompt, self.tokens), lambda made: float(len(made)))

    def _of_transformers(self, model: Any) -> Task:
        import torch

        model = self._adapted(model)
        ids = self._prompts(model)
        arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "use_cache": True, "pad_token_id": 0}
        arguments |= {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens}
        write: Callable[[], Any] = lambda: model.generate(input_ids=ids, **arguments)  # noqa: E731
        return Task(write, lambda made: float(made[:, ids.shape[1] :].numel()))

    def _prompts(self, model: Any) -> Any:
        import torch

        generator = torch.Generator().manual_seed(0)
        return torch.randint(3, model.config.vocab_size, (self.batch, PROMPT), generator=generator)

    def _adapted(self, model: Any) -> Any:
        """In `eval()`, with an adapter of bf16 that changes something."""
        if self.adapter:
            import torch
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, config, autocast_adapter_dtype=False)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        return model.eval()
