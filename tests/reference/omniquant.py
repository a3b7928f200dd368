"""Learned weight clipping with gradients written out by hand and Adam as in its paper, float64."""

from __future__ import annotations

import numpy as np


def learned_clipping(
    weight: np.ndarray, gram: np.ndarray, bits: int, steps: int, rate: float, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel ranges: the decoded weight of the best step of every row, and its losses `[out]`."""
    theta = np.full((len(weight), 2), 4.0)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    energy = np.einsum("oi,ij,oj->o", weight, gram, weight)
    least, best = np.full(len(weight), np.inf), np.zeros_like(weight)
    high = np.abs(weight).max(1) if symmetric else np.maximum(weight.max(1), 0)
    low = -high if symmetric else np.minimum(weight.min(1), 0)
    for step in range(1, steps + 2):
        share = 1 / (1 + np.exp(-theta))
        if symmetric:
            bottom, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            scale, zero = high * share[:, 0] / top, np.zeros(len(weight))
            scale_by_share = np.stack((high / top, np.zeros_like(high)), 1)
        else:
            bottom, top = 0, 2**bits - 1
            scale = (high * share[:, 0] - low * share[:, 1]) / top
            zero = np.clip(np.rint(-low * share[:, 1] / scale), 0, top)
            scale_by_share = np.stack((high / top, -low / top), 1)
        exact = weight / scale[:, None]
        unbounded = np.rint(exact) + zero[:, None]
        codes = np.clip(unbounded, bottom, top)
        decoded = (codes - zero[:, None]) * scale[:, None]
        inside = (unbounded >= bottom) & (unbounded <= top)
        decoded_by_scale = codes - zero[:, None] - inside * exact
        gradient = 2 * (decoded - weight) @ gram
        losses = np.einsum("oi,oi->o", gradient / 2, decoded - weight)
        better = losses < least
        least[better], best[better] = losses[better], decoded[better]
        by_scale = (gradient * decoded_by_scale).sum(1) / energy
        slope = by_scale[:, None] * scale_by_share * share * (1 - share)
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        theta -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return best, least
