"""torch.compile takes a prepared model with adapters as one graph: nothing of ours breaks it, forward or backward.

The graph runs the same operations as without it (`aot_eager`), so results may differ by the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import fourbit
from fourbit.nn.lora import LoraQuantLinear

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# torch's own, while it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(kind: str, *, dropout: float = 0.0, checkpointing: bool = False, **settings: Any) -> Any:
    """A small model in 4 bits with an adapter, prepared for training."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings}, attention_dropout=0.0)
    model = AutoModelForCausalLM.from_config(config)
    fourbit.quantize_module(model, fourbit.QuantConfig(block_size=32), skip=["lm_head"])
    adapter = LoraConfig(
        r=4, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, adapter)
    fourbit.prepare(adapted, gradient_checkpointing=checkpointing)
    assert sum(isinstance(module, LoraQuantLinear) for module in adapted.modules()) == 14
    return adapted.train()


def step(model: Any, run: Any) -> list[Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    model.zero_grad()
    out = run(input_ids=ids, labels=labels)
    assert out.logits is None
    out.loss.backward()
    return [out.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph(kind: str, checkpointing: bool) -> None:
    model = trained(kind, checkpointing=checkpointing)
    plain = step(model, model)
    compiled = step(model, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(compiled) == len(plain) == 1 + 28
    largest = max(x.norm() for x in plain)
    for a, b in zip(compiled, plain, strict=True):
        # some 200 operations in fp32, each of which may round in another place
        assert (a - b).norm() <= 200 * torch.finfo(torch.float32).eps * (b.norm() + 1e-3 * largest)


def test_one_graph_with_dropout() -> None:
    model = trained("llama", dropout=0.2)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    first = step(model, run)
    torch.manual_seed(0)
    again = step(model, run)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(step(model, run)[0], first[0])


def test_evaluation_is_one_graph_too() -> None:
    model = trained("llama").eval()
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=ids).logits
        expected = model(input_ids=ids).logits
    assert (logits - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()
