"""A leaner step is taken if its first token is the model's own."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Candidate", "proven"]

_LOG = logging.getLogger("fourbit")
_PROVEN: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()
"""What has been proven of a model, and for which modules in it."""


class Candidate(Protocol):
    """A step of decoding that may not be the model's."""

    def __call__(self, text: Tensor) -> Tensor:
        """See `decode.Step`."""

    def trial(self, text: Tensor) -> Tensor:
        """The logits of one token, with the cache left as it was."""

    def resume(self) -> None:
        """Go on after the token of the trial."""


def proven(
    model: Any, candidate: Candidate, plain: Callable[[Tensor], Tensor], *, tolerance: float
) -> Callable[[Tensor], Tensor]:
    """The candidate, or what makes the first token both ways and then goes on with the candidate or without.

    Args:
        model: of transformers.
        candidate: not started yet.
        plain: a step by the model's own forward pass.
        tolerance: how far logits may lie apart, in units of the largest one's rounding; 0 for the same bits.
    """
    circumstances = type(candidate), tuple(type(module) for module in model.modules())
    known = _PROVEN.setdefault(model, set())
    if circumstances in known:
        candidate.resume()
        return candidate
    return _Both(candidate, plain, tolerance, lambda: known.add(circumstances))


class _Both:
    """The first step both ways, then one of them."""

    def __init__(
        self, candidate: Candidate, plain: Callable[[Tensor], Tensor], tolerance: float, note: Callable[[], None]
    ) -> None:
        self._candidate, self._plain, self._tolerance, self._note = candidate, plain, tolerance, note
        self._step: Callable[[Tensor], Tensor] | None = None

    def __call__(self, text: Tensor) -> Tensor:
        if self._step is not None:
            return self._step(text)
        ours = self._candidate.trial(text)
        own = self._plain(text)  # last, so that the cache holds what the model itself has put there
        if _agree(ours, own, self._tolerance):
            self._note()
            self._candidate.resume()
            self._step = self._candidate
        else:
            _LOG.warning(
                "decoding with the model's own forward pass: %s gives other scores.", type(self._candidate).__name__
            )
            self._step = self._plain
        return own


def _agree(ours: Tensor, own: Tensor, tolerance: float) -> bool:
    if tolerance == 0:
        return torch.equal(ours, own)
    apart = (ours - own).abs().amax()
    return bool(apart <= tolerance * torch.finfo(own.dtype).eps * own.abs().amax())
