"""Algorithm 3 of the paper's supplement, literally: Cholesky whitening, full SVD, triangular solve."""

from __future__ import annotations

import numpy as np


def whitened_svd(error: np.ndarray, tokens: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The rank-r correction `[out, in]` of `error` on `tokens` `[n, in]`, and all singular values of `E S`."""
    root = np.linalg.cholesky(tokens.T @ tokens)
    u, sigma, vt = np.linalg.svd(error @ root, full_matrices=False)
    down = np.linalg.solve(root.T, vt[:rank].T).T
    return (u[:, :rank] * sigma[:rank]) @ down, sigma


def scaled_svd(error: np.ndarray, weights: np.ndarray, rank: int) -> np.ndarray:
    """The best rank-r correction of `E diag(weights)` (LQER; LoRC with weights of one)."""
    u, sigma, vt = np.linalg.svd(error * weights, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank] / weights
