"""Atom column by column: GPTQ over all inputs in the order of their energy, the last ones with 8 bits; float64."""

from __future__ import annotations

import numpy as np

from tests.reference.spqr import grid_of


def atom(weight: np.ndarray, gram: np.ndarray, bits: int, group: int, fine: int) -> np.ndarray:
    """The decoded weight `[out, in]`, inputs in their original order; symmetric groups."""
    order = np.argsort(np.diag(gram), kind="stable")
    w, hessian = weight[:, order].copy(), gram[np.ix_(order, order)].copy()
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    out, size = w.shape
    decoded, kept = np.zeros_like(w), size - fine
    for c in range(kept):
        if c % group == 0:
            grids = [grid_of(row, bits, symmetric=True) for row in w[:, c : c + group]]
        inverse = np.linalg.inv(hessian[c:, c:])
        for row in range(out):
            scale, _, low, high = grids[row]
            decoded[row, c] = np.clip(np.rint(w[row, c] / scale), low, high) * scale
            w[row, c:] -= (w[row, c] - decoded[row, c]) / inverse[0, 0] * inverse[0]
    scale = np.float16(np.abs(w[:, kept:]).max(1, keepdims=True) / 127).astype(np.float64)
    decoded[:, kept:] = np.clip(np.rint(w[:, kept:] / scale), -127, 127) * scale
    result = np.zeros_like(decoded)
    result[:, order] = decoded
    return result
