"""The rehearsal holds what a real step holds, for several architectures and knobs."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig

import fourbit
from fourbit.errors import InputError, NotAModel
from fourbit.memory.blueprint import Blueprint, draw, read_model_config
from fourbit.memory.knobs import Knobs
from fourbit.memory.rehearsal import Peak, rehearse
from fourbit.memory.workspaces import CHUNK_BYTES
from fourbit.models.shapes import config_of, random_model, size_bytes

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 512}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0},
    "mixtral": {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
}


def config_for(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **SMALL, **ARCHITECTURES[model_type])


def fake(config: Any, knobs: Knobs) -> Blueprint:
    return draw(*read_model_config(config), knobs)


def real(config: Any, knobs: Knobs) -> Any:
    """The same model with memory."""
    model = random_model(config, fourbit.QuantConfig(), dtype=getattr(torch, knobs.dtype))
    fourbit.prepare(model, gradient_checkpointing=knobs.checkpointing)
    lora = peft.LoraConfig(r=knobs.rank, lora_dropout=knobs.dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, knobs.adapter_dtype))
    return model.train()


def step_of(model: Any, knobs: Knobs) -> Peak:
    """A real step, counted by the same account."""
    return rehearse(Blueprint(model, contextlib.nullcontext(), None), knobs)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_without_memory_holds_what_a_real_one_holds(model_type: str, checkpointing: bool) -> None:
    # torch's fake product of experts is for bf16 alone
    dtype = "bfloat16" if model_type == "mixtral" else "float32"
    knobs = Knobs(batch_size=2, sequence_length=48, rank=4, checkpointing=checkpointing, dtype=dtype)
    planned = rehearse(fake(config_for(model_type), knobs), knobs)
    held = step_of(real(config_for(model_type), knobs), knobs)
    # Both count what torch allocates; what a real step makes on the way to a shape (a scalar, an index) is noise.
    assert planned.total == pytest.approx(held.total, rel=0.02)
    assert planned.gradients == held.gradients


@pytest.mark.parametrize(
    "changes",
    [{"adapter_dtype": "bfloat16"}, {"dropout": 0.1}, {"dtype": "bfloat16"}, {"accumulation": 4}, {"rank": 32}],
    ids=str,
)
def test_each_knob_counts_as_in_a_real_step(changes: dict[str, Any]) -> None:
    knobs = Knobs(**({"batch_size": 2, "sequence_length": 64, "rank": 8} | changes))
    config = config_for("llama")
    assert rehearse(fake(config, knobs), knobs).total == pytest.approx(
        step_of(real(config, knobs), knobs).total, rel=0.02
    )


def test_weights_are_those_of_a_loaded_model() -> None:
    for quantization in ({}, {"format": "fp4", "block_size": 128, "double_quant": False}):
        weights = fake("tiny", Knobs(**quantization)).weights  # type: ignore[arg-type]
        model = random_model("tiny", fourbit.QuantConfig(**quantization))  # type: ignore[arg-type]
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert weights.codes + weights.scales + weights.others == size_bytes(model) + buffers
    bare = fake("tiny", Knobs(format="none")).weights
    assert (bare.codes, bare.scales) == (0, 0)
    assert bare.others == size_bytes(random_model("tiny", None)) + buffers


def test_adapters_are_counted_by_rank_and_target() -> None:
    few = fake("tiny", Knobs(rank=4, target_modules=("q_proj", "v_proj"))).weights
    assert few.trainable == 2 * 2 * 4 * (64 + 64)
    assert few.adapters == 4 * few.trainable
    assert fake("tiny", Knobs(rank=4, adapter_dtype="bfloat16")).weights.adapters % 2 == 0


def test_checkpoints_on_the_host_leave_the_device() -> None:
    knobs = Knobs(batch_size=16, sequence_length=1024, rank=8, device="cuda")
    deep = config_of("tiny")
    deep.num_hidden_layers = 12
    here, away = (rehearse(fake(deep, each), each) for each in (knobs, knobs.with_(checkpointing="offload")))
    inputs = 12 * knobs.tokens * 64 * 2
    assert here.host == 0
    assert away.host >= inputs
    # All but two of the twelve inputs of the layers are gone.
    assert here.total - away.total == pytest.approx(inputs * 10 / 12, rel=0.15)


def test_a_gpu_holds_the_decoded_weight_only_while_it_multiplies() -> None:
    knobs = Knobs(batch_size=2, sequence_length=64, rank=8)
    on_cpu, on_gpu = (rehearse(fake("tiny", each), each) for each in (knobs, knobs.with_(device="cuda")))
    assert on_cpu.workspace > 0
    assert on_cpu.logits == 2 * 64 * 256 * 2  # kept; the labels of a batch are all there is
    assert on_gpu.total < on_cpu.total + on_gpu.workspace


def test_pieces_of_the_logits_are_those_of_the_kernels() -> None:
    from fourbit.kernels.native import cross_entropy

    assert CHUNK_BYTES["cpu"] == cross_entropy.CHUNK_BYTES
    triton = pytest.importorskip("fourbit.kernels.triton.cross_entropy")
    assert CHUNK_BYTES["cuda"] == triton.CHUNK_BYTES


def test_transposed_layers_can_be_rehearsed() -> None:
    small = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=256)
    knobs = Knobs(batch_size=2, sequence_length=64, rank=4)
    assert rehearse(fake(small, knobs), knobs).total > 0


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(NotAModel, match="no language model"):
        fake(AutoConfig.for_model("vit"), Knobs())
    with pytest.raises(InputError, match="No module of this LlamaForCausalLM is named"):
        fake("tiny", Knobs(target_modules=("nothing",)))
