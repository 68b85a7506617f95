"""What the sixteen values of a 4-bit number are.

A format is a codebook: up to sixteen levels in [-1, 1], one per 4-bit code. A block of weights is stored as codes and
one scale, the block's largest magnitude (`absmax`); weight = level * absmax. This is the only place where the levels
stand; every backend receives them as arguments.

Sources: NF4 and NormalFloat, QLoRA (arXiv:2305.14314), appendix E as corrected by the released table. FP4 is E2M1 in
the code order of bitsandbytes. INT4 is the symmetric integer grid -7..7, the baseline of the paper.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from fourbit.errors import UnknownFormat

__all__ = ["CODEBOOKS", "CODES", "FP4", "INT4", "NF2", "NF3", "NF4", "Codebook", "codebook", "normal_float"]

CODES = 16
"""Codes of a 4-bit number. A codebook with fewer levels leaves the last codes unused."""


@dataclass(frozen=True)
class Codebook:
    """The levels of one format.

    Attributes:
        name: what `QuantConfig.format` and files on disk call it.
        levels: 2 to 16 fp32 values in [-1, 1], by code.
        order: codes by ascending level. Where two levels are equal (FP4 has two zeros) it fixes which code a value
            just below and just above them takes.
    """

    name: str
    levels: tuple[float, ...]
    order: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= CODES:
            raise ValueError(f"A codebook has 2 to {CODES} levels, {self.name} has {len(self.levels)}.")
        order = self.order or tuple(sorted(range(len(self.levels)), key=lambda code: self.levels[code]))
        if sorted(order) != list(range(len(self.levels))):
            raise ValueError(f"The order of codebook {self.name} is not a permutation of its codes.")
        ascending = [self.levels[code] for code in order]
        if ascending != sorted(ascending) or max(map(abs, ascending)) > 1:
            raise ValueError(f"The levels of codebook {self.name} must ascend along its order within [-1, 1].")
        object.__setattr__(self, "order", order)

    @cached_property
    def table(self) -> npt.NDArray[np.float32]:
        """[16] fp32: the level of each code; unused codes repeat the last level."""
        padding = (self.levels[-1],) * (CODES - len(self.levels))
        return np.array(self.levels + padding, dtype=np.float32)

    @cached_property
    def ranked_codes(self) -> npt.NDArray[np.uint8]:
        """[16] uint8: the code of the level with a given rank; unused ranks repeat the last code."""
        padding = (self.order[-1],) * (CODES - len(self.order))
        return np.array(self.order + padding, dtype=np.uint8)

    @cached_property
    def thresholds(self) -> npt.NDArray[np.float32]:
        """[15] fp32: midpoints of neighbouring levels, ascending, padded with +inf.

        The rank of a value is the number of thresholds strictly below it, so a tie takes the lower level.
        """
        ascending = self.table[list(self.order)]
        midpoints = np.full(CODES - 1, np.inf, dtype=np.float32)
        midpoints[: len(self.order) - 1] = (ascending[:-1] + ascending[1:]) / np.float32(2)
        return midpoints

    @cached_property
    def zero_code(self) -> int:
        """The code that the value 0 takes; it fills the unused half of the last byte of an odd-sized tensor."""
        return int(self.ranked_codes[int((self.thresholds < 0).sum())])


def normal_float(levels: int, *, name: str | None = None) -> Codebook:
    """Derive the NormalFloat with a given number of levels.

    The levels are quantiles of N(0, 1), so that normally distributed weights use every code equally often, taken
    separately for the two halves so that zero is exact:

        o         = 1 - 1/2 (1/(2k) + 1/(2(k-1)))
        positives = ppf(linspace(o, 1/2, k//2 + 1)[:-1])
        negatives = -ppf(linspace(o, 1/2, k - k//2)[:-1])
        levels    = sort(positives, 0, negatives) / max

    Args:
        levels: k, 3 to 16.
        name: defaults to `nf` and the bits it takes (`nf3` for 8 levels) or `nfk12` for other counts.

    Raises:
        ValueError: k out of range.

    Source: QLoRA, arXiv:2305.14314, equation 4, which taken literally starts at ppf(0) = -inf; `o` is the offset of
    the released code (0.9677083 for k = 16). NF4 itself keeps its published constants, which this derivation meets
    within 2.3e-7.
    """
    if not 3 <= levels <= CODES:
        raise ValueError(f"A NormalFloat has 3 to {CODES} levels, not {levels}.")
    offset = 1 - (1 / (2 * levels) + 1 / (2 * (levels - 1))) / 2
    quantile = NormalDist().inv_cdf
    positives = [quantile(float(p)) for p in np.linspace(offset, 0.5, levels // 2 + 1)[:-1]]
    negatives = [-quantile(float(p)) for p in np.linspace(offset, 0.5, levels - levels // 2)[:-1]]
    largest = max(positives)
    values = sorted(value / largest for value in (*positives, 0.0, *negatives))
    bits = {4: 2, 8: 3, 16: 4}.get(levels)
    return Codebook(name or (f"nf{bits}" if bits else f"nfk{levels}"), tuple(float(np.float32(v)) for v in values))


NF4 = Codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# E2M1 over its largest value 12. Code 0 is the zero a value rounds to from below and code 8 from above: bitsandbytes
# sorts the sixteen values stably and takes the first zero for ties.
_FP4_MAGNITUDES = tuple(float(np.float32(value) / np.float32(12)) for value in (0.0, 0.0625, 8, 12, 4, 6, 2, 3))
FP4 = Codebook("fp4", _FP4_MAGNITUDES + tuple(-value if value else 0.0 for value in _FP4_MAGNITUDES))

INT4 = Codebook("int4", tuple(float(np.float32(step) / np.float32(7)) for step in range(-7, 8)))
NF3 = normal_float(8)
NF2 = normal_float(4)

CODEBOOKS: dict[str, Codebook] = {book.name: book for book in (NF4, FP4, INT4, NF3, NF2)}
"""Every format that has a name, NF4 first."""


def codebook(name: str) -> Codebook:
    """Look a format up by name.

    Raises:
        UnknownFormat: with the nearest valid name.
    """
    if name in CODEBOOKS:
        return CODEBOOKS[name]
    nearest = difflib.get_close_matches(str(name).lower(), CODEBOOKS, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise UnknownFormat(f"There is no 4-bit format named {name!r}; the formats are {', '.join(CODEBOOKS)}.{hint}")
