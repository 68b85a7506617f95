"""Texts that are there twice: the same, or nearly.

Two texts are *the same* when they differ in case and white space alone. They are *near* when at least `NEAR` of all
sequences of five words that occur in either occur in both (their Jaccard index). Every pair would be 1.2 billion
comparisons of 50,000 texts, so MinHash proposes: of a random order of all sequences, the first one of each text is the
same in both with just the probability that is their Jaccard index. A hundred orders in twenty bands of five propose a
pair at the threshold with 1 - (1 - 0.8^5)^20 = 99.96%, and each proposed pair is then compared exactly.
Source: Broder 1997, "On the resemblance and containment of documents".
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["NEAR", "SEQUENCE", "Duplicates", "find_duplicates"]

NEAR = 0.8
SEQUENCE = 5
"""Words in a row."""

_BANDS, _ROWS = 20, 5
_MOST_COMPARED = 8
"""Texts of one bucket that a further one is compared with: where more are alike, being near one of them is enough."""


@dataclass(frozen=True)
class Duplicates:
    """Which texts are there more than once, by their numbers.

    Attributes:
        first: for each text, the first that is the same; its own number where it is the first.
        near: for a text that is the first of its kind, earlier such texts that are near it, not the same.
    """

    first: list[int]
    near: dict[int, list[int]]


def find_duplicates(texts: Sequence[str], *, progress: Callable[[int, int], None] | None = None) -> Duplicates:
    """Find the texts that are the same as, or near, one before them.

    Args:
        progress: called now and then with how many are done, and how many there are.
    """
    seen: dict[str, int] = {}
    first: list[int] = []
    near: dict[int, list[int]] = {}
    sequences: dict[int, NDArray[np.uint64]] = {}
    buckets: defaultdict[bytes, list[int]] = defaultdict(list)
    hashes: dict[str, int] = {}
    random = np.random.default_rng(0)
    factors = random.integers(0, 2**63, (_BANDS * _ROWS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = random.integers(0, 2**63, (_BANDS * _ROWS, 1), dtype=np.uint64)
    for number, text in enumerate(texts):
        if progress is not None and number % 500 == 0:
            progress(number, len(texts))
        words = text.casefold().split()
        first.append(seen.setdefault(" ".join(words), number))
        if first[-1] != number or not words:
            continue
        found = sequences[number] = _sequences(words, hashes)
        # The high bits alone are well mixed by multiplying modulo 2^64.
        signature = ((found[None, :] * factors + offsets) >> np.uint64(32)).min(axis=1).astype(np.uint32)
        proposed: set[int] = set()
        for band in range(_BANDS):
            rows = signature[band * _ROWS : (band + 1) * _ROWS]
            bucket = buckets[bytes([band]) + rows.tobytes()]
            proposed.update(bucket[-_MOST_COMPARED:])
            bucket.append(number)
        if close := [other for other in sorted(proposed) if _likeness(found, sequences[other]) >= NEAR]:
            near[number] = close
    return Duplicates(first, near)


def _sequences(words: list[str], hashes: dict[str, int]) -> NDArray[np.uint64]:
    """A 64-bit hash of each distinct sequence; a text of fewer words is one sequence."""
    for word in words:
        if word not in hashes:
            hashes[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    each = np.array([hashes[word] for word in words], dtype=np.uint64)
    length = min(SEQUENCE, len(words))
    found = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for place in range(length):
        found = found * np.uint64(0x9E3779B97F4A7C15) + each[place : place + len(found)]
    return np.unique(found)


def _likeness(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """What both have, of what either has."""
    if min(len(one), len(other)) < NEAR * max(len(one), len(other)):
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
