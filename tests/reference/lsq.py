"""LSQ's gradients written out by hand and Adam as in its paper, in float64; symmetric, one step size a row."""

from __future__ import annotations

import numpy as np


def lsq(weight: np.ndarray, gram: np.ndarray, bits: int, steps: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """The decoded weight of the best iterate of every row, and its relative losses `[out]`."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    first = 2 * np.abs(weight).mean(1) / np.sqrt(high)
    values = {"moved": np.zeros_like(weight), "grown": np.ones(len(weight))}
    moments = {key: (np.zeros_like(value), np.zeros_like(value)) for key, value in values.items()}
    energy = np.einsum("oi,ij,oj->o", weight, gram, weight)
    least, best = np.full(len(weight), np.inf), np.zeros_like(weight)
    for step in range(1, steps + 2):
        w = weight + values["moved"] * first[:, None]
        s = np.float16(values["grown"] * first)[:, None].astype(np.float64)
        inside = (w / s >= low) & (w / s <= high)
        codes = np.rint(np.clip(w / s, low, high))
        slope = 2 * (codes * s - weight) @ gram / energy[:, None]
        losses = np.einsum("oi,oi->o", slope / 2, codes * s - weight)
        better = losses < least
        least[better], best[better] = losses[better], (codes * s)[better]
        by_step = np.where(inside, codes - w / s, codes)  # the end of the range outside
        scale = 1 / np.sqrt(weight.shape[1] * high)
        gradients = {
            "moved": slope * inside * first[:, None],
            "grown": (slope * by_step).sum(1) * scale * first,
        }
        for key, gradient in gradients.items():
            mean, square = moments[key]
            mean[:] = 0.9 * mean + 0.1 * gradient
            square[:] = 0.999 * square + 0.001 * gradient**2
            values[key] = values[key] - rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        values["grown"] = np.clip(values["grown"], 0.1, 10)
    return best, least
