"""A step of decoding on a GPU as one CUDA graph: the host asks for it once, in place of launching every kernel.

A graph repeats the same kernels on the same memory. So a token goes in through a tensor that stays, positions and the
place of a token in the cache are counted on the device, and attention sees the whole cache, with a mask that is made
from those counts. It is the model's own forward pass that is captured, whatever its architecture, if it takes its
positions and masks from outside; the first token is also made without the graph, to see that it does.

A graph is captured for the rows and the room of one batch, and goes with it: capturing takes as long as a few steps,
and what it was captured from (an adapter, say) may be another one the next time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["BUCKET", "FEWEST", "Captured", "room_for"]

BUCKET = 256
"""Caches have room for a multiple of so many tokens: few sizes, so that freed memory fits the next cache."""

FEWEST = 8
"""Tokens for which capturing pays: it costs about three steps."""

_WARM_UP_RUNS = 2
_GIVEN = ("input_ids", "attention_mask", "position_ids", "past_key_values")


def room_for(tokens: int) -> int:
    """What a cache that is to be captured has room for."""
    return -(-tokens // BUCKET) * BUCKET


class Captured:
    """One step of decoding; see the file's head.

    Args:
        model: of transformers, after its prompts.
        cache: of `Room`s that keep all tokens, filled with the prompts.
        inputs: that transformers prepared for the prompts.

    Raises:
        ValueError: the model cannot be captured; says why.
    """

    def __init__(self, model: Any, cache: Any, inputs: dict[str, Any]) -> None:
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        self._attends = model.config.get_text_config(decoder=True)._attn_implementation
        if positions is None or positions.dim() != 2:
            raise ValueError("it counts positions by itself")
        if self._attends not in ("sdpa", "eager"):
            raise ValueError(f"it attends by {self._attends}, which takes no mask over a cache")
        self._model, self._cache = model, cache
        self._others = {name: value for name, value in inputs.items() if name not in _GIVEN}
        width, device = cache.get_seq_length(), positions.device
        self._tokens = positions.new_zeros((positions.shape[0], 1))
        self._positions = positions[:, -1:] + 1
        self._place = torch.tensor([width], device=device)
        # Where each row begins; padding lies before it.
        hidden = torch.zeros_like(self._tokens) if mask is None else width - mask.sum(dim=-1, keepdim=True)
        self._begins = hidden.view(-1, 1, 1, 1)
        self._slots = torch.arange(cache.layers[0].keys.shape[2], device=device)
        self._windows = _windows(model, cache)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def capture(self) -> None:
        """Put the step into a graph; on a device without graphs it stays a plain call."""
        self._tokens.fill_(0)
        self.resume()
        try:
            if self._tokens.device.type == "cuda":
                self._record()
        finally:
            self._pause()

    def _record(self) -> None:
        """Warm up on a side stream, as capturing asks for: libraries set themselves up and kernels are compiled."""
        before = self._positions.clone(), self._place.clone()
        side = torch.cuda.Stream(self._tokens.device)
        side.wait_stream(torch.cuda.current_stream(self._tokens.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                self._run()
                # What it wrote into the cache lies where nothing is seen before it is written again.
                self._positions.copy_(before[0])
                self._place.copy_(before[1])
        torch.cuda.current_stream(self._tokens.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        self._graph = graph

    def __call__(self, text: Tensor) -> Tensor:
        """See `decode.Step`; the logits are overwritten by the next call."""
        self._tokens.copy_(text[:, -1:])
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits

    def trial(self, text: Tensor) -> Tensor:
        """The logits of the first token, with the cache left as it was."""
        self.resume()
        logits = self(text).clone()
        self._pause()
        return logits

    def resume(self) -> None:
        """Take the cache over, from where its rooms are now."""
        for room in self._cache.layers:
            room.capture(self._place)

    def _pause(self) -> None:
        for room in self._cache.layers:
            room.release()

    def _run(self) -> None:
        outputs = self._model(
            input_ids=self._tokens,
            position_ids=self._positions,
            attention_mask=self._masks(),
            past_key_values=self._cache,
            return_dict=True,
            **self._others,
        )
        self._logits = outputs.logits[:, -1]
        self._positions += 1
        self._place += 1

    def _masks(self) -> Tensor | dict[str, Tensor]:
        masks = {name: self._mask(window) for name, window in self._windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, capacity]: what the new token sees; bool, or what is added to scores."""
        visible = (self._slots <= self._place) & (self._slots >= self._begins)
        if window is not None:
            visible = visible & (self._slots > self._place - window)
        if self._attends == "sdpa":
            return visible
        dtype = self._model.dtype
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


def _windows(model: Any, cache: Any) -> dict[str, int | None]:
    """Each kind of layer, by the name under which the model looks for its mask, and its window.

    Raises:
        ValueError: layers of one name differ.
    """
    windows = [room.window for room in cache.layers]
    names = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["all"] * len(windows)
    found: dict[str, int | None] = {}
    for name, window in zip(names, windows, strict=False):  # layers that share another's keys have none of their own
        if found.setdefault(name, window) != window:
            raise ValueError("its layers attend within different windows")
    return found
