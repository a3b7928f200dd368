"""DL-QAT's rounded weight and its gradients written out by hand, in float64; one symmetric scale group a row."""

from __future__ import annotations

import numpy as np


def rounded(
    weight: np.ndarray, up: np.ndarray, down: np.ndarray, magnitude: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The weight `[out, in]` that is computed with, and where it is inside its range."""
    high = 2 ** (bits - 1) - 1
    scale = np.float16(np.abs(weight).max(1, keepdims=True) / high).astype(np.float64)
    exact = (weight + up @ down) / scale
    inside = (np.rint(exact) >= -high - 1) & (np.rint(exact) <= high)
    return magnitude[:, None] * scale * np.clip(np.rint(exact), -high - 1, high), inside


def gradients(
    weight: np.ndarray, up: np.ndarray, down: np.ndarray, magnitude: np.ndarray, bits: int, slope: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `up`, `down` and `magnitude`, for the loss's slope `[out, in]` at the rounded weight."""
    found, inside = rounded(weight, up, down, magnitude, bits)
    passed = slope * inside * magnitude[:, None]  # straight through the rounding, not where it is cut off
    return passed @ down.T, up.T @ passed, (slope * found / magnitude[:, None]).sum(1)
