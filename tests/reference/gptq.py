"""GPTQ without blocks: every error is spread at once over all columns to come."""

from __future__ import annotations

import numpy as np


def gptq(weight: np.ndarray, gram: np.ndarray, bits: int, group: int, damping: float, *, symmetric: bool) -> np.ndarray:
    """Decoded weight `[out, in]` float64; scales are found from the updated weights when a group begins."""
    w, hessian = weight.astype(np.float64).copy(), gram.astype(np.float64).copy()
    hessian[np.diag_indices_from(hessian)] += damping * np.diag(hessian).mean()
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    decoded = np.empty_like(w)
    high = 2 ** (bits - 1) - 1
    for column in range(w.shape[1]):
        if column % group == 0:
            part = w[:, column : column + group].astype(np.float32).astype(np.float64)
            if symmetric:
                scale = np.float16(np.maximum(np.abs(part).max(1), 1e-5) / high).astype(np.float64)
                zero = np.zeros(len(w))
                low, top = -high - 1, high
            else:
                largest, smallest = np.maximum(part.max(1), 0), np.minimum(part.min(1), 0)
                scale = np.float16(np.maximum(largest - smallest, 1e-5) / (2**bits - 1)).astype(np.float64)
                zero = np.clip(np.rint(-smallest / scale), 0, 2**bits - 1)
                low, top = 0, 2**bits - 1
        decoded[:, column] = (np.clip(np.rint(w[:, column] / scale) + zero, low, top) - zero) * scale
        error = (w[:, column] - decoded[:, column]) / factor[column, column]
        w[:, column + 1 :] -= np.outer(error, factor[column, column + 1 :])
    return decoded
