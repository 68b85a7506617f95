"""Sections of whole models of a shape: training step, decode, peak memory. They run on a GPU and on a CPU alike."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.bench.case import OURS, Case
from fourbit.bench.device import cases
from fourbit.bench.device.clock import peak_bytes, reset_peak, stopwatch, synchronize
from fourbit.bench.device.ops import read_calls
from fourbit.bench.device.settings import Ledger, Settings
from fourbit.bench.machine import GEMM_BF16
from fourbit.bench.peers import UNSLOTH, through_bitsandbytes, unsloth_model
from fourbit.bench.run import Samples
from fourbit.models.prepare import prepare
from fourbit.models.process import peak_resident_bytes
from fourbit.models.shapes import random_model
from fourbit.quant import QuantConfig

__all__ = [
    "adapted",
    "contender_model",
    "left_out",
    "memory",
    "read_limit",
    "step",
    "token_ids",
    "train_step",
]

STEPS_BEFORE = 2
"""Steps that are thrown away: kernels are compiled and memory is found in them."""


def step(settings: Settings, ledger: Ledger, shape: str, contender: str) -> None:
    """Training steps of one contender, without checkpointing and with it."""
    for checkpointing in (False, True):
        case = cases.step_case(
            shape,
            checkpointing=checkpointing,
            batch=settings.batch,
            length=settings.length,
            rank=settings.rank,
            layers=settings.layers,
        )
        model: Any = None  # also of one that ran out of memory nothing is left
        reset_peak(settings.device)
        with left_out(case, contender, ledger):
            model = contender_model(contender, shape, checkpointing, settings)
            taken = {contender: _timed_steps(model, settings)}
            model = None
            reset_peak(settings.device)
            taken[GEMM_BF16] = _gemm(settings)
            ledger.add(case, taken, without=() if contender == OURS else (GEMM_BF16,))


def memory(settings: Settings, ledger: Ledger, shape: str) -> None:
    """The peak of a few steps of batch 1: with the optimizer's states elsewhere, and with fp32 states on the device."""
    case = cases.memory_case(shape, length=settings.length, rank=settings.rank, layers=settings.layers)
    device = settings.device
    with left_out(case, OURS, ledger):
        model = contender_model(OURS, shape, True, settings)
        ids = token_ids(model, 1, settings)
        trained = [one for one in model.parameters() if one.requires_grad]
        taken = {}
        for name in (cases.ADAPTERS_ONLY, cases.FP32_STATES):
            states = None if name == cases.ADAPTERS_ONLY else _fp32_states(trained)
            reset_peak(device)
            for _ in range(2):
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                if states is not None:
                    _adam(trained, states)
                for one in trained:
                    one.grad = None
            synchronize(device)
            peak = peak_bytes(device) or peak_resident_bytes()
            taken[name] = Samples([peak / 1e9], check=float(loss.detach()), peaks=[peak_resident_bytes()])
            taken[name].device_peaks.append(peak_bytes(device))
        ledger.add(case, taken)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """Forward, loss, backward, update; the loss."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def adapted(model: Any, *, rank: int) -> Any:
    """A model with bf16 adapters on all linear layers, the same for everybody who has the same layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    model.train()
    model.config.use_cache = False
    return model


@contextmanager
def left_out(case: Case, contender: str, ledger: Ledger) -> Iterator[None]:
    """What fails is a sentence, and the rest goes on."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
        ledger.note(f"{case.name}: {contender} is left out: {type(error).__name__}: {first}")


def contender_model(contender: str, shape: str, checkpointing: bool, settings: Settings) -> Any:
    """The model of a shape as a contender trains it."""
    if contender == UNSLOTH:
        return _through_unsloth(shape, checkpointing, settings)
    four_bits = random_model(shape, QuantConfig(), device=settings.device, layers=settings.layers)
    four_bits.set_attn_implementation("sdpa")
    if contender == OURS:
        return adapted(prepare(four_bits, gradient_checkpointing=checkpointing), rank=settings.rank)
    if contender == cases.BNB_LEAN:
        return adapted(_checkpointed(through_bitsandbytes(four_bits), checkpointing), rank=settings.rank)
    # The 16-bit weights are the decoded ones, so that the losses have to agree.
    wide = four_bits.hf_quantizer._dequantize(four_bits, torch.bfloat16)
    if contender == cases.OUR_LORA:
        return adapted(prepare(wide, gradient_checkpointing=checkpointing), rank=settings.rank)
    return adapted(_checkpointed(wide, checkpointing), rank=settings.rank)


def _checkpointed(model: Any, checkpointing: bool) -> Any:
    model.requires_grad_(False)
    if checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)  # transformers is about to rename it
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model


def _through_unsloth(shape: str, checkpointing: bool, settings: Settings) -> Any:
    """Written to a folder in bitsandbytes' layout first, since it loads from folders only; with any tokenizer."""
    with tempfile.TemporaryDirectory(prefix="fourbit-bench-") as name:
        folder = Path(name)
        model = random_model(shape, QuantConfig(), device=settings.device, layers=settings.layers)
        model.save_pretrained(folder)
        del model
        reset_peak(settings.device)
        with resources.as_file(resources.files("fourbit.demo") / "model") as tokenizer:
            for file in tokenizer.glob("tokenizer*"):
                shutil.copy(file, folder)
        model = unsloth_model(folder, length=settings.length, rank=settings.rank, checkpointing=checkpointing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model.train()


def _timed_steps(model: Any, settings: Settings) -> Samples:
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=2e-4, fused=settings.device == "cuda"
    )
    ids = token_ids(model, settings.batch, settings)
    samples, losses = Samples(), []
    for number in range(STEPS_BEFORE + settings.samples):
        seconds = stopwatch(settings.device, lambda: losses.append(train_step(model, optimizer, ids)))
        if number == 0:
            samples.check = float(losses[0])
        if number >= STEPS_BEFORE:
            samples.seconds.append(seconds)
    samples.device_peaks.append(peak_bytes(settings.device))
    samples.peaks.append(peak_resident_bytes())
    return samples


def token_ids(model: Any, batch: int, settings: Settings) -> Tensor:
    """[batch, length] random tokens, the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (batch, settings.length), generator=generator).to(settings.device)


def _gemm(settings: Settings) -> Samples:
    """Seconds per GFLOP of a large product."""
    side = 256 if settings.quick else 8192
    a, b = (torch.randn(side, side, device=settings.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    stopwatch(settings.device, lambda: torch.mm(a, b, out=out))
    taken = [stopwatch(settings.device, lambda: torch.mm(a, b, out=out)) for _ in range(5)]
    return Samples([seconds / (2 * side**3 / 1e9) for seconds in taken])


def read_limit(settings: Settings) -> Samples:
    """Seconds per GB of reading a large buffer."""
    (call,) = read_calls(settings)
    size = 1 << 20 if settings.quick else 1 << 30
    stopwatch(settings.device, call)
    return Samples([stopwatch(settings.device, call) / (size / 1e9) for _ in range(5)])


def _fp32_states(parameters: list[nn.Parameter]) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.zeros_like(one, dtype=torch.float32), torch.zeros_like(one, dtype=torch.float32)) for one in parameters
    ]


def _adam(parameters: list[nn.Parameter], states: list[tuple[Tensor, Tensor]]) -> None:
    """An Adam step with fp32 states for bf16 parameters, one parameter at a time: torch's own keeps bf16 states."""
    with torch.no_grad():
        for parameter, (first, second) in zip(parameters, states, strict=True):
            assert parameter.grad is not None
            grad = parameter.grad.float()
            first.lerp_(grad, 0.1)
            second.mul_(0.999).addcmul_(grad, grad, value=0.001)
            parameter.sub_(first / (second.sqrt() + 1e-8), alpha=2e-4)
