"""A tiny model trained on the Triton path and on the reference: the same losses, but for the order of sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fourbit
from fourbit.kernels import dispatch
from fourbit.kernels.triton import linear as triton_linear
from fourbit.kernels.triton import unavailable

if (reason := unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

# peft uses the names that transformers has had longest
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, LEARNING_RATE = 12, 5e-3


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA of one layer: its products are the 7 of a layer, and interpreting them takes no minutes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("one_layer")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def curve(folder: Path, dtype: torch.dtype, *, rate: float = LEARNING_RATE, noise: float = 0.0) -> Tensor:
    """[STEPS] losses of a run with dropout; with noise, every gradient element is off by that relative amount."""
    model: Any = fourbit.load(folder, dtype=dtype).to(DEVICE)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    generator, losses = torch.Generator().manual_seed(5), []
    data = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(4))
    for step in range(STEPS):
        torch.manual_seed(step)  # the dropout masks
        tokens = data[2 * (step % 2) :][:2].to(DEVICE)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for parameter in parameters:
            assert parameter.grad is not None
            scatter = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            parameter.grad *= 1 + noise * scatter
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
def test_the_losses_are_those_of_the_reference(
    one_layer: Path, dtype: torch.dtype, unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other roundings may do to a curve is measured: the reference with every gradient off by 16 of them.
    Four times the largest effect, and as many roundings of the loss itself, is the bound (as beside bitsandbytes in
    test_training.py). A learning rate 10% higher has to break it, or it would let anything pass."""
    taken: list[str] = []
    choose = triton_linear.choose

    def noted(*arguments: Any) -> triton_linear.Way:
        way = choose(*arguments)
        taken.append(way.name)
        return way

    monkeypatch.setattr(triton_linear, "choose", noted)
    with dispatch.use("reference"):
        truth = curve(one_layer, dtype)
        noisy = curve(one_layer, dtype, noise=16 * unit)
        other = curve(one_layer, dtype, rate=1.1 * LEARNING_RATE)
    assert not taken
    with dispatch.use("triton"):
        mine = curve(one_layer, dtype)
    bound = 4 * (noisy - truth).abs().max() + 16 * 2**-24 * truth.max()
    assert truth[-2:].mean() < truth[:2].mean() - 0.5, "nothing was learned, so nothing was compared"
    assert (mine - truth).abs().max() <= bound
    assert (other - truth).abs().max() > bound
    assert set(taken) == {"decoded" if dtype == torch.float32 else "skinny"}
