"""How the next token is chosen: the likeliest, or drawn by a generator that belongs to the prompt alone.

transformers draws for a whole batch from one generator, so what a prompt gets depends on what else is in its batch.
Here each prompt has a generator of its own, seeded by the run's seed and the prompt's key, and draws one number a
token: the answer is the same in any batch, in any order, and after an interruption.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fourbit.errors import InputError

__all__ = ["NextToken", "Sampling"]

_AHEAD = 32
"""Numbers that are drawn for a row at once, so that a GPU is not given them one by one."""


@dataclass(frozen=True)
class Sampling:
    """How answers are made.

    Attributes:
        max_new_tokens: the most tokens of an answer; fewer where the model's context ends before.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature).
        top_p: draw only from the likeliest tokens that together reach this probability; 1 draws from all.
        top_k: draw only from so many of the likeliest tokens; 0 draws from all.
        seed: of the draw, together with each prompt's key.
        stop: strings that end an answer, besides the end of a turn; they are no part of it.

    Raises:
        InputError: a value out of its range; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"The number of new tokens is {self.max_new_tokens}; it must be at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"The temperature is {self.temperature}; it must be 0 (the likeliest token) or above.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1.")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; it must be 0 (all tokens) or above.")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise InputError("top_p and top_k need a temperature above 0; at 0 the likeliest token is taken.")
        if not all(self.stop):
            raise InputError("A stop string is empty; give the text that ends an answer.")


class NextToken(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token a row that is not impossible, so that the greedy loop of transformers takes it.

    Args:
        settings: how to choose.
        keys: one per row, what its generator is seeded with besides `settings.seed`.
    """

    def __init__(self, settings: Sampling, keys: Sequence[str]) -> None:
        self._temperature = settings.temperature
        self._finite: Tensor | None = None
        self._drawn: Tensor | None = None
        self._next = 0
        self._generators = [_generator(settings.seed, key) for key in keys]
        self._warpers: list[Any] = []
        if settings.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k > 0:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(settings.top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores to [B, V], without the host waiting for the device; `check` tells whether they were numbers."""
        finite = torch.isfinite(scores.amax(dim=-1)).all()
        self._finite = finite if self._finite is None else self._finite & finite
        if self._temperature == 0:
            return scores
        scores = scores.double()  # a small temperature would overflow less
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        reached = scores.softmax(dim=-1).cumsum(dim=-1)
        # The first token whose cumulated probability is above what was drawn; its own probability is then not zero.
        threshold = self._draw(reached.device) * reached[:, -1:]
        chosen = torch.searchsorted(reached, threshold, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def check(self) -> None:
        """Look at the scores so far; the host waits for the device.

        Raises:
            InputError: the model's scores are not numbers.
        """
        if self._finite is not None and not self._finite:
            raise InputError(
                "The model gives scores that are not numbers: its weights or its adapter are damaged, or too large for"
                " its dtype."
            )

    def _draw(self, device: torch.device) -> Tensor:
        """[B, 1], each row's next number; drawn and moved `_AHEAD` at a time."""
        if self._drawn is None or self._next == _AHEAD:
            drawn = [[each.random() for _ in range(_AHEAD)] for each in self._generators]
            self._drawn, self._next = torch.tensor(drawn, dtype=torch.float64).to(device), 0
        self._next += 1
        return self._drawn[:, self._next - 1 : self._next]


def _generator(seed: int, key: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
