"""A QLoRA training step on the CPU: forward, loss, backward, AdamW, at fixed shapes.

All contenders train rank-16 adapters on every linear layer of one LLaMA with one optimizer on the same tokens:

    fourbit                     `fourbit.prepare`, bf16 adapters
    fourbit, 16-bit LoRA        the same without 4 bits: what 4 bits cost us
    bitsandbytes, documented    the recipe of its documentation: `prepare_model_for_kbit_training`, which makes what is
                                not in 4 bits fp32, and peft's default fp32 adapters
    bitsandbytes, lean          the same without those fp32 copies, bf16 adapters
    peft, 16-bit LoRA           plain transformers + peft in bf16
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourbit.bench.case import OURS, Bar, Case, Contender, Measure, Share, Task
from fourbit.bench.machine import GEMM_BF16, gemm_limit
from fourbit.bench.peers import BITSANDBYTES, bitsandbytes_model
from fourbit.models.shapes import shape_of

__all__ = ["cases", "step_flops"]

DOCUMENTED, LEAN = f"{BITSANDBYTES}, documented", f"{BITSANDBYTES}, lean"
OUR_LORA = f"{OURS}, 16-bit LoRA"
RANK = 16
FULL, QUICK = "llama-135m", "tiny"


def cases(quick: bool) -> tuple[Case, ...]:
    """Without and with gradient checkpointing."""
    return _case(quick, checkpointing=False), _case(quick, checkpointing=True)


def _case(quick: bool, *, checkpointing: bool) -> Case:
    batch, length = (2, 16) if quick else (4, 256)
    shape = QUICK if quick else FULL
    tokens = batch * length
    documented, lean = (1.6, 1.25) if checkpointing else (2.0, 1.25)
    setup = _Setup(batch, length, checkpointing)
    work = Share(GEMM_BF16, step_flops(shape, tokens, checkpointing=checkpointing) / 1e9)
    return Case(
        name=f"step{'-checkpointing' if checkpointing else ''}",
        title=f"QLoRA step, {'tiny' if quick else '135.5 M'} LLaMA, {batch} × {length} tokens, r = {RANK}, bf16"
        + (", gradient checkpointing" if checkpointing else ""),
        measure=Measure("tokens/s", tokens),
        contenders=(
            Contender(OURS, setup.ours, share=work),
            Contender(OUR_LORA, setup.our_lora, share=work),
            Contender(DOCUMENTED, setup.documented, needs=BITSANDBYTES, share=work),
            Contender(LEAN, setup.lean, needs=BITSANDBYTES, share=work),
            Contender("peft, 16-bit LoRA", setup.peft_lora, share=work),
            gemm_limit(256 if quick else 4096),
        ),
        bars=(
            Bar("speed", DOCUMENTED, documented),
            Bar("speed", LEAN, lean),
            Bar("speed", OUR_LORA, 0.95),
            Bar("memory", DOCUMENTED, 1.0),
            Bar("memory", LEAN, 1.0),
        ),
        repeats=1 if quick else 5,
        rounds=1 if quick else 3,
        sample_s=0,
        warmup=0 if quick else 2,
        together=False,
        fixture=_write_quick if quick else _write_full,
    )


def step_flops(shape: str, tokens: int, *, checkpointing: bool, layers: int | None = None) -> float:
    """Floating-point operations of the matrix products with frozen weights, which no recipe can do without.

    Forward and input gradient are 2 per parameter and token each; checkpointing repeats the forward pass of the layers.
    """
    found = shape_of(shape)
    head, depth = found.head_parameters, int(found.settings["num_hidden_layers"])
    in_layers: float = found.layer_parameters * (layers or depth) / depth
    return 2.0 * tokens * (in_layers * (3 if checkpointing else 2) + head * 2)


class _Setup:
    """The contenders of one case: which model, how prepared, how adapted."""

    def __init__(self, batch: int, length: int, checkpointing: bool) -> None:
        self.batch, self.length, self.checkpointing = batch, length, checkpointing

    def ours(self, folder: Path) -> Task:
        import torch

        import fourbit

        model = fourbit.load(folder, fourbit.QuantConfig(), dtype=torch.bfloat16)
        return self._task(fourbit.prepare(model, gradient_checkpointing=self.checkpointing), fp32_adapters=False)

    def our_lora(self, folder: Path) -> Task:
        import fourbit

        model = fourbit.prepare(_sixteen_bit(folder), gradient_checkpointing=self.checkpointing)
        return self._task(model, fp32_adapters=False)

    def documented(self, folder: Path) -> Task:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            bitsandbytes_model(folder), use_gradient_checkpointing=self.checkpointing
        )
        return self._task(model, fp32_adapters=True)

    def lean(self, folder: Path) -> Task:
        return self._task(self._checkpointed(bitsandbytes_model(folder)), fp32_adapters=False)

    def peft_lora(self, folder: Path) -> Task:
        return self._task(self._checkpointed(_sixteen_bit(folder)), fp32_adapters=False)

    def _checkpointed(self, model: Any) -> Any:
        if self.checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        return model

    def _task(self, model: Any, *, fp32_adapters: bool) -> Task:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=fp32_adapters)
        if not fp32_adapters:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        model.train()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size

        def step() -> Any:
            ids = torch.randint(0, vocabulary, (self.batch, self.length), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return Task(step, float)


def _sixteen_bit(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _write_full(folder: Path) -> None:
    _write(folder, FULL)


def _write_quick(folder: Path) -> None:
    _write(folder, QUICK)


def _write(folder: Path, shape: str) -> None:
    from fourbit.models.shapes import random_model

    random_model(shape, None).save_pretrained(folder)
