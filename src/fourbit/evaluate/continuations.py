"""How likely a causal language model finds texts after a context, for many contexts that begin alike.

Multiple-choice questions behind the same worked examples, the choices of one question, the questions of all subjects
behind one heading: their keys and values are computed once for a beginning that is shared, wherever that saves tokens,
and the rows are batched behind it, those of about one length together. Continuations that differ in their last token
only are one row, as their logits are. The output head sees the positions that are scored, and no others.

None of this changes what is computed for a token, only in which order: sums in another order differ by rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fourbit.models.mode import evaluating

__all__ = ["Asked", "Scored", "score_continuations"]

GROUP_TOKENS = 256
"""What a group of rows of its own costs beside its tokens, in tokens: a pass for one row alone, and a batch that is not
full."""

GROUP_SHARE = 0.25
"""The least part of its tokens that a group has to save: behind a beginning, attention needs a mask, a slower path."""

Ids: TypeAlias = "npt.NDArray[np.int32]"


class Asked(NamedTuple):
    """Token ids: a context of one or more, and its continuations of one or more each."""

    context: Sequence[int] | Ids
    continuations: Sequence[Sequence[int]]


class Scored(NamedTuple):
    """Continuation `which` of what was asked at `place`.

    Attributes:
        log_likelihood: the sum over its tokens, in nats.
        greedy: whether each of its tokens is the likeliest there.
    """

    place: int
    which: int
    log_likelihood: float
    greedy: bool


class _Row(NamedTuple):
    """What the model reads at once: a context, and of a continuation all but the last token.

    Attributes:
        ids: [T].
        start: tokens of the context.
        scored: (place, which, ids) of the continuations that can be read off the row's logits.
    """

    ids: Ids
    start: int
    scored: list[tuple[int, int, Sequence[int]]]


def score_continuations(model: nn.Module, asked: Sequence[Asked], *, batch_size: int) -> Iterator[list[Scored]]:
    """Score every continuation of every context, a batch at a time and in an order of its own.

    Args:
        model: a causal language model of transformers, quantized or not, with an adapter or not. Run in `eval()`; left
            as it was found.
        asked: what to score; nothing is shortened, so it must fit.
        batch_size: rows in one forward pass.
    """
    rows = [row for place, one in enumerate(asked) for row in _rows(place, one)]
    with evaluating(model), torch.no_grad():
        for shared, group in _groups([row.ids[: row.start] for row in rows]):
            prefix = _prefix(model, rows[group[0]].ids[:shared])
            group.sort(key=lambda place: -len(rows[place].ids))
            for start in range(0, len(group), batch_size):
                batch = [rows[place] for place in group[start : start + batch_size]]
                yield _score(model, batch, shared if prefix is not None else 0, prefix)


def _rows(place: int, asked: Asked) -> list[_Row]:
    """As few rows as the continuations can be read off: one, where they are single tokens."""
    rows: list[_Row] = []
    context = np.asarray(asked.context, dtype=np.int32)
    order = sorted(range(len(asked.continuations)), key=lambda which: -len(asked.continuations[which]))
    for which in order:
        ids = asked.continuations[which]
        head = np.concatenate([context, np.asarray(ids[:-1], dtype=np.int32)])
        row = next((row for row in rows if np.array_equal(row.ids[: len(head)], head)), None)
        if row is None:
            rows.append(row := _Row(head, len(context), []))
        row.scored.append((place, which, ids))
    return rows


def _groups(contexts: Sequence[Ids]) -> Iterator[tuple[int, list[int]]]:
    """Which rows to run behind one cached beginning, and how many tokens that has; 0 for none.

    From the shortest beginning that contexts share to the longest, each becomes a group's where that saves tokens. The
    last token of a context is never in it, as what comes next is scored there.
    """
    order = sorted(range(len(contexts)), key=lambda place: contexts[place].astype(">i4").tobytes())
    common = np.array([_common(contexts[a], contexts[b]) for a, b in pairwise(order)], dtype=np.int64)
    ends = np.cumsum([0, *(len(contexts[place]) for place in order)])
    group = np.zeros(len(contexts), dtype=np.int64)
    lengths = [0]
    waiting = [(0, len(contexts), 0)]
    while waiting:
        low, high, depth = waiting.pop()
        if high - low < 2:
            continue
        within = common[low : high - 1]
        shared = int(within.min())
        saved, left = (high - low) * (shared - depth), ends[high] - ends[low] - (high - low) * depth
        if saved > max(shared + GROUP_TOKENS, GROUP_SHARE * left):
            group[low:high] = len(lengths)
            lengths.append(shared)
            depth = shared
        cuts = [low, *(low + 1 + np.flatnonzero(within == shared)), high]
        waiting += [(int(a), int(b), depth) for a, b in pairwise(cuts)]
    for number, shared in enumerate(lengths):
        found = [order[j] for j in np.flatnonzero(group == number)]
        if found:
            yield shared, found


def _common(first: Ids, second: Ids) -> int:
    """How many tokens both begin with, one of each being left over."""
    length = min(len(first), len(second)) - 1
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _prefix(model: Any, ids: Ids) -> Any:
    """The keys and values of a beginning, for one row.

    None where that is empty, or where the model keeps what cannot be handed to many rows: a recurrent state, say.
    """
    if not len(ids):
        return None
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    input_ids = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0).to(model.device)
    cache = model(input_ids=input_ids, use_cache=True, logits_to_keep=1).get("past_key_values")
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    return cache if kinds and kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else None


def _for_rows(prefix: Any, count: int) -> Any:
    """The cache of one row as that of many, which share its memory; what the model appends is theirs alone."""
    cache = copy.copy(prefix)
    cache.layers = [copy.copy(layer) for layer in prefix.layers]
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(count, -1, -1, -1)
            layer.values = layer.values.expand(count, -1, -1, -1)
    return cache


def _score(model: Any, rows: Sequence[_Row], shared: int, prefix: Any) -> list[Scored]:
    """Run a batch of rows that begin with the same `shared` tokens, which `prefix` has seen."""
    cases = [(b, row, *case) for b, row in enumerate(rows) for case in row.scored]
    scored = max(len(row.ids) - row.start for row in rows) + 1
    last = torch.tensor([[len(row.ids) - shared - 1] for row in rows])
    first = torch.tensor([[row.start - shared - 1] for row in rows])
    places = torch.minimum(first + torch.arange(scored), last)
    logits = _logits(model, [row.ids[shared:] for row in rows], places, shared, prefix)
    steps = [(b, j, ids[j], case) for case, (b, _, _, _, ids) in enumerate(cases) for j in range(len(ids))]
    b, j, tokens, case = torch.tensor(steps).to(logits.device).unbind(dim=1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    norms = torch.stack([row.to(wide).logsumexp(dim=-1) for row in logits])  # one at a time: words are many
    found = logits[b, j, tokens].double() - norms[b, j].double()  # so that rounding makes no two letters equal
    sums = found.new_zeros(len(cases)).index_add_(0, case, found).tolist()
    missed = (logits.argmax(dim=-1)[b, j] != tokens).double()
    misses = missed.new_zeros(len(cases)).index_add_(0, case, missed).tolist()
    return [
        Scored(place, which, total, not wrong)
        for (_, _, place, which, _), total, wrong in zip(cases, sums, misses, strict=True)
    ]


def _logits(model: Any, rows: Sequence[Ids], places: Tensor, shared: int, prefix: Any) -> Tensor:
    """[B, P, V]: what is predicted at each of [B, P] places of the rows.

    Rows are padded on the right, where causal attention cannot see it.
    """
    width = max(map(len, rows))
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    device = model.device
    lines = torch.arange(len(rows)).unsqueeze(1)
    narrowed: list[bool] = []

    def chosen(found: Tensor) -> Tensor:
        return found[lines.to(found.device), places.to(found.device)]

    def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(inputs) != 1 or inputs[0].shape[:2] != padded.shape:
            return None
        narrowed.append(True)
        return (chosen(inputs[0]),)

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(narrow)
    try:
        logits: Tensor = model(
            input_ids=torch.from_numpy(padded).to(device),
            attention_mask=torch.ones(len(rows), shared + width, dtype=torch.int64, device=device),
            position_ids=torch.arange(shared, shared + width, device=device).expand(len(rows), -1),
            past_key_values=None if prefix is None else _for_rows(prefix, len(rows)),
            use_cache=prefix is not None,
        ).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits if len(narrowed) == 1 and logits.shape[1] == places.shape[1] else chosen(logits)
