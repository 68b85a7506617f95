"""Training in float16: with a scaled loss it neither overflows nor loses gradients, and follows the run in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fourbit

STEPS = 8
"""Few enough for rounding not to have grown into chaos: the paths of this model part at the tenth."""
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks


def trained(dtype: torch.dtype) -> Any:
    """A small model in 4 bits that computes in `dtype`, with an adapter in fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).to(dtype)
    fourbit.quantize_module(model, fourbit.QuantConfig(block_size=32), skip=["lm_head"])
    fourbit.prepare(model)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapter).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def losses(dtype: torch.dtype, *, scale: float) -> tuple[Tensor, float]:
    """The losses of a run on one batch, and the factor that the loss has at its end."""
    model = trained(dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, scaler = torch.optim.SGD(parameters, lr=0.5), torch.amp.GradScaler("cpu", init_scale=scale)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    while len(found) < STEPS:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in parameters)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:  # else the gradients overflowed, and the step was left out
            found.append(loss.detach())
    return torch.stack(found), scaler.get_scale()


def test_float16_follows_fp32_closer_than_bfloat16_does() -> None:
    """Each product rounds to 11 bits in place of 8, so a run in fp16 errs by an eighth of what one in bf16 does."""
    exact, _ = losses(torch.float32, scale=1.0)
    half, _ = losses(torch.float16, scale=2.0**16)
    rough, _ = losses(torch.bfloat16, scale=1.0)
    assert exact[-1] < exact[0] - 0.1  # it learns, so that the runs have something to differ in
    assert half.isfinite().all()
    assert (half - exact).abs().max() <= (rough - exact).abs().max() / 4  # an eighth, and as much again


def test_a_scale_that_overflows_is_found_and_lowered() -> None:
    exact, _ = losses(torch.float32, scale=1.0)
    half, scale = losses(torch.float16, scale=2.0**30)
    assert scale < 2.0**30
    assert half.isfinite().all()
    assert (half - exact).abs().max() <= (losses(torch.bfloat16, scale=1.0)[0] - exact).abs().max() / 4
