"""Perplexity: how surprised a model is by a text, per token.

    perplexity     = exp(sum of -log p(token | what came before it) / tokens)
    bits per byte  = sum of -log2 p / bytes of the scored text, comparable between tokenizers

The convention. Each document stands alone and each of its tokens is scored exactly once. In front of the first token
stands the tokenizer's BOS token, or its EOS token where it has no BOS; where it has neither, the first token is context
only. An end-of-text token is not scored. A document longer than the window of L tokens is scored in steps: the first
window scores L tokens, each further one the next `stride` tokens, seeing the L tokens before the last of them. So every
token but those of the first window has at least L - stride tokens of context. With stride = L (the default) this is
the rolling log-likelihood of EleutherAI's lm-evaluation-harness, token for token; a smaller stride costs L / stride
times as much and gives a lower, fairer number for long texts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.evaluate.bootstrap import bootstrap_interval
from fourbit.evaluate.losses import IGNORED, TokenLosses
from fourbit.models.mode import evaluating
from fourbit.models.out_of_memory import Halving

__all__ = ["DEFAULT_LENGTH", "Perplexity", "measure_perplexity"]

DEFAULT_LENGTH = 2048
"""The longest window that is taken without being asked for."""


@dataclass(frozen=True)
class Perplexity:
    """What a model scored on a text.

    Attributes:
        losses: [D] float64, the sum of -log p in nats over each document.
        tokens_per_document: [D] int64, the tokens that were scored.
        bytes_per_document: [D] int64, the bytes of UTF-8 that those tokens stand for.
        sequence_length: L, tokens that the model sees at most.
        stride: tokens scored by each window after a document's first.
        seconds: spent in the model.
    """

    losses: np.ndarray[Any, np.dtype[np.float64]] = field(repr=False)
    tokens_per_document: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    bytes_per_document: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    sequence_length: int
    stride: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return int(self.tokens_per_document.sum())

    @property
    def bytes(self) -> int:
        """Bytes of UTF-8 scored."""
        return int(self.bytes_per_document.sum())

    @property
    def negative_log_likelihood(self) -> float:
        """The sum of -log p over all tokens, in nats."""
        return math.fsum(self.losses)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token; infinite where that overflows."""
        mean = self.negative_log_likelihood / self.tokens
        return math.exp(mean) if mean < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The sum of -log2 p per byte of text."""
        return self.negative_log_likelihood / math.log(2) / self.bytes

    def interval(self, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """A bootstrap interval of the perplexity over documents: low, high."""
        columns = np.stack([self.losses, self.tokens_per_document.astype(np.float64)], axis=1)
        return bootstrap_interval(lambda sums: np.exp(sums[:, 0] / sums[:, 1]), columns, level=level, seed=seed)


def measure_perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    limit_tokens: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score documents under a causal language model, by the convention at the head of this module.

    Args:
        model: of transformers, quantized or not, with an adapter or not. Run in `eval()`; left as it was found.
        tokenizer: of transformers, the model's own.
        documents: texts; empty ones are passed over.
        sequence_length: L, by default what the model was made for, at most `DEFAULT_LENGTH`.
        stride: 1 to L, by default L.
        limit_tokens: score the first so many tokens and no more; the last document is cut at a whole character.
        batch_size: windows in one forward pass: `batch_size` full ones, or as many short ones as take that room. Where
            that does not fit into memory, half as many from there on; the scores are the same.
        progress: called with the tokens scored and the tokens in all, after each forward pass.

    Returns:
        the score; see `Perplexity`.

    Raises:
        InputError: a setting out of range, fewer than two tokens to score, a tokenizer of another model, or a model
        whose probabilities are not numbers.
    """
    length = _window_length(model, sequence_length)
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise InputError(f"The stride is {stride}; it must lie between 1 and the sequence length, {length}.")
    if limit_tokens is not None and limit_tokens < 2:
        raise InputError(f"The limit is {limit_tokens} tokens; a perplexity needs at least 2.")
    if batch_size < 1:
        raise InputError(f"The batch size is {batch_size}; it must be at least 1.")
    encoded = _encode(tokenizer, documents, limit_tokens)
    _check_ids(model, encoded)
    started = time.perf_counter()
    losses = _score(model, encoded, length, stride, batch_size, progress)
    score = Perplexity(
        losses=losses,
        tokens_per_document=np.array([document.scored for document in encoded], dtype=np.int64),
        bytes_per_document=np.array([document.size_bytes for document in encoded], dtype=np.int64),
        sequence_length=length,
        stride=stride,
        seconds=time.perf_counter() - started,
    )
    if not math.isfinite(score.perplexity):
        raise InputError(
            f"At {score.bits_per_byte:.3g} bits per byte the model's perplexity is beyond any number: its weights are"
            " damaged, or the tokenizer is another model's."
        )
    return score


class _Document(NamedTuple):
    """A document as token ids: `ids[1:]` are targets, of which the first `unscored` do not count.

    `cut` says that the limit fell into it.
    """

    ids: Tensor
    unscored: int
    size_bytes: int
    cut: bool

    @property
    def scored(self) -> int:
        return len(self.ids) - 1 - self.unscored


class _Window(NamedTuple):
    """One row of a forward pass: predict targets `first` to `stop` of a document from the ids after `start`."""

    document: int
    start: int
    first: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


def _window_length(model: nn.Module, wanted: int | None) -> int:
    """The sequence length to use, checked against what the model was made for."""
    config: Any = model.config
    longest: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(longest or DEFAULT_LENGTH, DEFAULT_LENGTH)
    if wanted < 2:
        raise InputError(f"The sequence length is {wanted}; it must be at least 2.")
    if longest is not None and wanted > longest:
        raise InputError(f"The sequence length is {wanted}, but this model was made for at most {longest} tokens.")
    return wanted


def _encode(tokenizer: Any, documents: Iterable[str], limit: int | None) -> list[_Document]:
    """Token ids of all documents that hold something to score, up to the limit.

    Raises:
        InputError: there are fewer than two tokens to score.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded: list[_Document] = []
    tokens = 0
    for text in documents:
        document = _encode_one(tokenizer, text, prefix, None if limit is None else limit - tokens)
        if document.scored > 0:
            encoded.append(document)
            tokens += document.scored
        if document.cut or tokens == limit:
            break
    if tokens < 2:
        raise InputError(
            f"The text holds {tokens or 'no'} token{'s'[: tokens != 1]} to score; it must hold at least 2."
        )
    return encoded


def _encode_one(tokenizer: Any, text: str, prefix: int | None, room: int | None) -> _Document:
    """One document, cut to `room` scored tokens."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    begin, end, size_bytes = 0, len(ids), len(text.encode())
    if (room is not None and room < len(ids)) or (prefix is None and ids):
        begin, end, size_bytes = _scored_range(tokenizer, text, skip=int(prefix is None), room=room)
    front = [] if prefix is None else [prefix]
    sequence = torch.tensor(front + ids[:end], dtype=torch.int64)
    return _Document(sequence, unscored=max(0, begin - 1), size_bytes=size_bytes, cut=end < len(ids))


def _scored_range(tokenizer: Any, text: str, *, skip: int, room: int | None) -> tuple[int, int, int]:
    """Which tokens of a text to score when not all are: begin, end, and the bytes between.

    A tokenizer that works on bytes can split a character; then the range begins after that character, and ends before
    it, so that the tokens stand for a whole number of characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"This tokenizer ({type(tokenizer).__name__}) does not say which characters a token stands for, which "
            "scoring a part of a document needs; give a text without a limit, and a tokenizer with a BOS or EOS token."
        )
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    begin = skip
    while 0 < begin < len(spans) and spans[begin][0] < spans[begin - 1][1]:
        begin += 1
    end = len(spans) if room is None else min(len(spans), begin + room)
    while begin < end < len(spans) and spans[end][0] < spans[end - 1][1]:
        end -= 1
    first = spans[begin][0] if 0 < begin < len(spans) else 0
    last = spans[end][0] if end < len(spans) else len(text)
    return begin, end, len(text[first:last].encode())


def _check_ids(model: nn.Module, encoded: list[_Document]) -> None:
    """Refuse a tokenizer whose ids the model does not know."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    known, largest = embeddings.weight.shape[0], max(int(document.ids.max()) for document in encoded)
    if largest >= known:
        raise InputError(
            f"The tokenizer gave token {largest}, but the model knows only {known}; is it another model's tokenizer?"
        )


def _windows(document: int, targets: int, length: int, stride: int) -> Iterator[_Window]:
    """The windows that score each of a document's targets once."""
    first, stop = 0, min(length, targets)
    while first < targets:
        yield _Window(document, max(0, stop - length), first, stop)
        first, stop = stop, min(stop + stride, targets)


def _batches(windows: list[_Window], room: int) -> Iterator[list[_Window]]:
    """Group windows, the widest first, so that a group padded to its widest takes at most `room` positions."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda window: -window.width):
        if batch and (len(batch) + 1) * batch[0].width > room:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _score(
    model: nn.Module,
    encoded: list[_Document],
    length: int,
    stride: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[D] float64: the loss of each document."""
    windows = [
        window
        for number, document in enumerate(encoded)
        for window in _windows(number, len(document.ids) - 1, length, stride)
    ]
    device = next(model.parameters()).device
    total, done = sum(document.scored for document in encoded), 0
    losses = np.zeros(len(encoded))
    smaller = Halving("windows", hint="give a shorter `sequence_length`")
    with evaluating(model):
        score = TokenLosses(model)

        def scores(batch: Sequence[_Window]) -> tuple[Any, Any]:
            inputs, targets = _rows(batch, encoded)
            rows = (targets != IGNORED).nonzero()[:, 0].numpy()
            return rows, score(inputs.to(device), targets.to(device)).double().cpu().numpy()

        batches = _batches(windows, batch_size * length)
        for batch, (rows, scored) in chain.from_iterable(smaller.run(batch, scores) for batch in batches):
            if not np.isfinite(scored).all():
                worst = encoded[batch[int(rows[~np.isfinite(scored)][0])].document]
                raise InputError(
                    f"The model gives a token no probability that is a number, in a text of {worst.scored} tokens: its "
                    "weights are damaged, or too large for its dtype."
                )
            np.add.at(losses, [batch[row].document for row in rows], scored)
            done += len(scored)
            if progress is not None:
                progress(done, total)
    return losses


def _rows(batch: Sequence[_Window], encoded: list[_Document]) -> tuple[Tensor, Tensor]:
    """[B, T] input ids and targets of a group of windows, padded on the right."""
    shape = len(batch), batch[0].width
    inputs, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED, dtype=torch.int64)
    for row, window in enumerate(batch):
        document = encoded[window.document]
        inputs[row, : window.width] = document.ids[window.start : window.stop]
        first = max(window.first, document.unscored)
        if first < window.stop:
            targets[row, first - window.start : window.width] = document.ids[first + 1 : window.stop + 1]
    return inputs, targets
