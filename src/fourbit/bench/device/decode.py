"""A section of greedy decoding at a shape, batch 1 to 32.

The clock runs from one token well behind the first to the last, so that the prompt, and whatever a loop sets up once,
is left out.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourbit.bench.case import OURS
from fourbit.bench.device import cases
from fourbit.bench.device.clock import peak_bytes, reset_peak
from fourbit.bench.device.models import left_out, read_limit
from fourbit.bench.device.settings import Ledger, Settings
from fourbit.bench.machine import READ
from fourbit.bench.peers import BITSANDBYTES
from fourbit.bench.run import Samples
from fourbit.models.process import peak_resident_bytes
from fourbit.models.shapes import random_model
from fourbit.nn import QuantLinear
from fourbit.nn.convert import replace_module
from fourbit.quant import QuantConfig

__all__ = ["decode", "eager_loop", "our_loop"]

Loop = Callable[[Any, Tensor, int], Iterator[list[int]]]
"""Takes a model, ids [B, T] and a number of tokens; gives the new token of each row, as often."""

PROMPT = 32
FROM, TO = 9, 41
"""Where the clock starts and stops; 8 k + 1, as our loop on a GPU hands out the first token, then eight at once."""


def decode(settings: Settings, ledger: Ledger, shape: str) -> None:
    """Every contender at every batch; one model at a time is in memory."""
    contenders: dict[str, tuple[Callable[[], Any], Loop]] = {
        OURS: (partial(_four_bits, shape, True, settings), our_loop),
        cases.PLAIN_SCALES: (partial(_four_bits, shape, False, settings), our_loop),
        cases.BNB_EAGER: (lambda: _eager_layers(_four_bits(shape, True, settings)), eager_loop),
        cases.TORCH_BF16: (partial(_sixteen_bits, shape, settings), our_loop),
    }
    if BITSANDBYTES not in settings.peers:
        del contenders[cases.BNB_EAGER]
    batches = (1, 2) if settings.quick else cases.BATCHES
    found = {batch: cases.decode_case(shape, batch, layers=settings.layers) for batch in batches}
    taken: dict[int, dict[str, Samples]] = {batch: {} for batch in batches}
    limit = read_limit(settings)
    first_ids: dict[int, list[list[int]]] = {}
    for name, (build, loop) in contenders.items():
        reset_peak(settings.device)
        with left_out(found[batches[0]], name, ledger), torch.no_grad():
            model = build()
            for batch in batches if name != cases.BNB_EAGER else batches[:1]:
                with left_out(found[batch], name, ledger):
                    samples, ids = _sampled(model, loop, batch, settings)
                    taken[batch][name] = samples
                    _compare(found[batch].name, name, ids, first_ids.setdefault(batch, ids), ledger)
        model = None
    for batch in batches:
        ledger.add(found[batch], {**taken[batch], READ: limit})


def our_loop(model: Any, ids: Tensor, tokens: int) -> Iterator[list[int]]:
    """The decode loop of `generate`: static cache, and a CUDA graph on a GPU."""
    from fourbit.generate.sampling import Sampling

    try:
        loop: Any = importlib.import_module("fourbit.generate.decode").decode
    except ModuleNotFoundError:
        yield from eager_loop(model, ids, tokens)
        return
    keys = [str(row) for row in range(len(ids))]
    yield from loop(model, ids.tolist(), settings=Sampling(), keys=keys, most=tokens, tokenizer=None)


def eager_loop(model: Any, ids: Tensor, tokens: int) -> Iterator[list[int]]:
    """The plain loop that anybody would write: the model with its cache, one token after the other."""
    from transformers import DynamicCache

    cache, new = DynamicCache(config=model.config), ids
    for _ in range(tokens):
        logits = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        new = logits[:, -1:].argmax(dim=-1)
        yield new[:, 0].tolist()


class _EagerLinear(nn.Module):
    """bitsandbytes' decode and torch's product, as two calls."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        from bitsandbytes.functional import QuantState

        tensors = layer.quantized.state_dict("weight")
        self.packed = tensors.pop("weight")
        self.state = QuantState.from_dict(tensors, device=self.packed.device)

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return F.linear(x, dequantize_4bit(self.packed, self.state))


def _eager_layers(model: Any) -> Any:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            replace_module(model, name, _EagerLinear(layer))
    return model


def _four_bits(shape: str, nested: bool, settings: Settings) -> Any:
    config = QuantConfig(double_quant=nested)
    return random_model(shape, config, device=settings.device, layers=settings.layers)


def _sixteen_bits(shape: str, settings: Settings) -> Any:
    """Of its own random weights: decoding those in 4 bits would need both in memory."""
    return random_model(shape, None, device=settings.device, layers=settings.layers)


def _sampled(model: Any, loop: Loop, batch: int, settings: Settings) -> tuple[Samples, list[list[int]]]:
    start, end = (2, 5) if settings.quick else (FROM, TO)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator).to(settings.device)
    found = list(loop(model, ids, end))  # kernels are compiled on the way
    samples = Samples(check=1.0)
    for _ in range(settings.samples):
        for count, _ in enumerate(loop(model, ids, end), start=1):
            if count == start:
                started = time.perf_counter()
        samples.seconds.append((time.perf_counter() - started) / (end - start))
    samples.device_peaks.append(peak_bytes(settings.device))
    samples.peaks.append(peak_resident_bytes())
    return samples, found


def _compare(case: str, name: str, ids: list[list[int]], ours: list[list[int]], ledger: Ledger) -> None:
    """Say how far another loop over the same weights agrees; random weights have close calls, rounded differently."""
    if name != cases.BNB_EAGER:
        return
    same = next((count for count, (a, b) in enumerate(zip(ids, ours, strict=True)) if a != b), len(ids))
    if same < len(ids):
        ledger.note(f"{case}: {name} and {OURS} decode the same ids for {same} of {len(ids)} tokens.")
