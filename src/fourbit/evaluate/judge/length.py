"""What a judge would prefer if both answers were of one length.

Judges favour long answers. As in the length control of AlpacaEval 2, the verdict is regressed on the difference in
length, and the preference is read off where that is zero:

    logit P(the pair's first system is preferred) = θ + γ tanh(d / s) + δ o

d is the difference in characters, s the root of its mean square, o is 1 where the first system is shown first and -1
where it is shown second. A tie is half a win. σ(θ) is the controlled share of points; γ says how much length is worth.
A small ridge keeps the fit finite where one system, or the longer answer, wins everything. If one system's answers are
longer by as much on every prompt, length and system are one: then there is no result, and where it is nearly so, the
interval is wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Controlled", "control_length"]

Array = NDArray[np.float64]

RIDGE = 0.01
"""A twenty-fifth of what one observation tells at even odds."""

LEAST_DEVIATION = 0.05
"""Of tanh(d / s); below it the ridge, and not the data, would divide the result between length and system."""

STEPS = 25


@dataclass(frozen=True)
class Controlled:
    """A share of points at equal lengths.

    Attributes:
        share: σ(θ).
        low, high: the percentile bootstrap interval over prompts.
        length_effect: γ; above 0 the judge favours the longer answer.
    """

    share: float
    low: float
    high: float
    length_effect: float


def control_length(
    points: Array,
    difference: Array,
    order: Array,
    prompts: NDArray[np.int64],
    *,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Controlled | None:
    """Fit the model of this module.

    Args:
        points: [n] 0, ½ or 1, of the pair's first system.
        difference: [n] its answer's length less the other's.
        order: [n] 1 where it is shown first, -1 where it is shown second.
        prompts: [n] number of the prompt, from 0; prompts are what is resampled.

    Returns:
        None where the difference in length is the same everywhere, and not zero.
    """
    scale = float(np.sqrt(np.mean(difference**2)))
    z = np.tanh(difference / scale) if scale else np.zeros_like(difference)
    if scale and z.std() < LEAST_DEVIATION:
        return None
    design = np.stack([np.ones_like(points), z, order], axis=1)
    count = int(prompts.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=samples)
    weights = np.concatenate([np.ones((1, len(points))), drawn[:, prompts].astype(np.float64)])
    fitted = _fit(design, points, weights)
    shares = 1 / (1 + np.exp(-fitted[:, 0]))
    low, high = np.quantile(shares[1:], [(1 - level) / 2, (1 + level) / 2])
    return Controlled(float(shares[0]), float(low), float(high), float(fitted[0, 1]))


def _fit(design: Array, points: Array, weights: Array) -> Array:
    """Ridge logistic regressions by Newton's method, all at once: [n, 3], [n], [S, n] to [S, 3]."""
    fitted = np.zeros((len(weights), design.shape[1]))
    for _ in range(STEPS):
        chance = 1 / (1 + np.exp(-np.clip(fitted @ design.T, -30, 30)))
        gradient = (weights * (points - chance)) @ design - RIDGE * fitted
        curvature = np.einsum("sn,ni,nj->sij", weights * chance * (1 - chance), design, design, optimize=True)
        step = np.linalg.solve(curvature + RIDGE * np.eye(3), gradient[..., None])[..., 0]
        fitted = fitted + np.clip(step, -2, 2)  # the first steps of a nearly separable fit are too long
        if np.abs(step).max() < 1e-9:
            break
    return fitted
