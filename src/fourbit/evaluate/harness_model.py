"""A model of ours as lm-evaluation-harness asks for one. Imported only where the harness is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from fourbit.errors import InputError
from fourbit.evaluate.continuations import Asked, score_continuations

__all__ = ["HarnessModel"]


class HarnessModel(HFLM):  # type: ignore[misc]
    """The harness' own wrapper of a transformers model, but for how continuations are scored.

    Its tokens and its truncation from the left are kept; `score_continuations` computes the sums. What a task lets the
    model write goes the harness' way, through transformers' `generate`.

    Args:
        model: loaded already, with an adapter or not.
        tokenizer: the model's own; it is given a pad token if it has none.
        batch_size: rows in one forward pass.
        max_length: tokens that the model reads at most; by default what it was made for.
        progress: called with the requests done, and how many there are of this kind.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        max_length: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self._progress = progress
        self._done = self._total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """See the harness; our progress in place of its bars, as in the two below."""
        self._begin(len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """See the harness."""
        self._begin(0)  # how many windows there are is not known here
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """See the harness."""
        self._begin(len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def _begin(self, total: int) -> None:
        self._done, self._total = 0, total

    def _tell(self, more: int) -> None:
        self._done += more
        if self._progress is not None and self._total:
            self._progress(self._done, self._total)

    def _model_generate(self, context: Any, *args: Any, **settings: Any) -> Any:
        written = super()._model_generate(context, *args, **settings)
        self._tell(len(context))
        return written

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of (text, context, continuation) each."""
        numbers: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"A continuation of the task has {len(continuation)} tokens; this model takes 1 to"
                    f" {self.max_length}."
                )
            kept = context[-(self.max_length + 1 - len(continuation)) :]  # the last token is read by nobody
            numbers.setdefault(tuple(kept), []).append(number)
        groups = list(numbers.values())
        asked = [Asked(context, [requests[j][2] for j in group]) for context, group in numbers.items()]
        found = [(0.0, False)] * len(requests)
        for batch in score_continuations(self.model, asked, batch_size=override_bs or self.batch_size):
            for scored in batch:
                found[groups[scored.place][scored.which]] = scored.log_likelihood, scored.greedy
            self._tell(len(batch))
        return found
