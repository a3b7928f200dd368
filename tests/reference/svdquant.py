"""SVDQuant's alternation with full SVDs in float64 and unrounded factors."""

from __future__ import annotations

import numpy as np

from tests.reference.grids import quantize_matrix, quantize_tokens


def svdquant(
    weight: np.ndarray,
    tokens: np.ndarray,
    inverse: np.ndarray,
    rank: int,
    grid: tuple[int, int | None, bool],
    activation_bits: int,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Decoded residual and low-rank part of the smoothed weight, and the losses of all iterates up to the first worse.

    Args:
        weight: `[out, in]`.
        tokens: `[n, in]`.
        inverse: `1 / s` `[in]`.
        rank: Of the low-rank branch.
        grid: Bits, group, symmetric.
        activation_bits: 0 for none.
    """
    bits, group, symmetric = grid
    smoothed, x = weight / inverse, tokens * inverse
    codes = np.zeros_like(weight)
    losses: list[float] = []
    best = (codes, codes)
    while True:
        u, sigma, vt = np.linalg.svd(smoothed - codes, full_matrices=False)
        low_rank = (u[:, :rank] * sigma[:rank]) @ vt[:rank]
        codes = quantize_matrix(smoothed - low_rank, bits, group, symmetric=symmetric)
        main = quantize_tokens(x, activation_bits) if activation_bits else x
        losses.append(float(np.square(main @ codes.T + x @ low_rank.T - tokens @ weight.T).sum()))
        if len(losses) > 1 and losses[-1] >= losses[-2]:
            return (*best, losses)
        best = (codes, low_rank)
