"""MBQ's search, literally: every power, every token, both quantizers, in float64."""

from __future__ import annotations

import numpy as np

from tests.reference.grids import quantize_matrix, quantize_tokens


def mbq_losses(
    weight: np.ndarray,
    tokens: np.ndarray,
    kinds: np.ndarray,
    ratio: float,
    grid: tuple[int, int | None, bool],
    activation_bits: int,
) -> list[float]:
    """The modality-balanced mean absolute error of each of 20 powers; `grid` is bits, group, symmetric."""
    bits, group, symmetric = grid
    losses = []
    magnitude = np.abs(tokens).mean(0)
    for step in range(20):
        scale = np.maximum(magnitude ** (step / 20), 1e-4)
        scale = scale / np.sqrt(scale.max() * scale.min())
        inverse = np.float16(1 / scale).astype(np.float64)
        rounded = quantize_matrix(weight / inverse, bits, group, symmetric=symmetric)
        x = tokens * inverse
        if activation_bits:
            x = quantize_tokens(x, activation_bits)
        error = np.abs(x @ rounded.T - tokens @ weight.T)
        answers, images = error[kinds == 2], error[kinds == 1]
        losses.append((answers.sum() + ratio * images.sum()) / (answers.size + images.size))
    return losses
