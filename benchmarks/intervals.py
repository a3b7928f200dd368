"""Bootstrap intervals of how much one quantization loses beside another, on the same held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
TAILS = (2.5, 97.5)  # percent


@dataclass(frozen=True)
class Interval:
    """A ratio and the interval that holds it in 95 % of the draws."""

    ratio: float
    low: float
    high: float


def ratio_interval(
    losses: Sequence[Sequence[float]], others: Sequence[Sequence[float]], draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Median over calibration seeds of the ratio of mean losses, with a paired bootstrap over seeds and samples.

    Every draw takes as many seeds, and as many held-out samples, as there are, with replacement, and the same samples
    on both sides.

    Args:
        losses: `[seeds][samples]` of one quantization.
        others: `[seeds][samples]` of the quantization that it is compared with.
        draws: Number of draws.
        seed: Seed of the draws.

    Example:
        >>> better, plain = [[0.5, 1.0, 1.5]], [[1.0, 2.0, 3.0]]
        >>> ratio_interval(better, plain)  # half on every sample
        Interval(ratio=0.5, low=0.5, high=0.5)
        >>> ratio_interval([[1.0, 0.0]], [[1.0, 1.0]])  # two samples say little
        Interval(ratio=0.5, low=0.0, high=1.0)
    """
    one, other = np.asarray(losses, np.float64), np.asarray(others, np.float64)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        rows, columns = (rng.integers(0, size, size) for size in one.shape)
        means = (side[rows][:, columns].mean(1) for side in (one, other))
        found.append(_median_ratio(*means))
    low, high = np.percentile(found, TAILS)
    return Interval(_median_ratio(one.mean(1), other.mean(1)), float(low), float(high))


def _median_ratio(losses: np.ndarray, others: np.ndarray) -> float:
    return float(np.median(losses / np.maximum(others, 1e-300)))
