"""QuIP as written: dense orthogonal matrices, an LDL decomposition by hand, and adaptive rounding with its feedback."""

from __future__ import annotations

import numpy as np


def ldl_feedback(hessian: np.ndarray) -> np.ndarray:
    """The strictly upper `U` of `H = (U + I) D (U + I)^T`, column by column from the last."""
    size = len(hessian)
    upper, diagonal = np.eye(size), np.zeros(size)
    for j in reversed(range(size)):
        later = range(j + 1, size)
        diagonal[j] = hessian[j, j] - sum(diagonal[k] * upper[j, k] ** 2 for k in later)
        for i in range(j):
            upper[i, j] = (hessian[i, j] - sum(upper[i, k] * diagonal[k] * upper[j, k] for k in later)) / diagonal[j]
    return upper - np.eye(size)


def ldlq(weight: np.ndarray, hessian: np.ndarray, bits: int) -> np.ndarray:
    """Symmetric codes of `bits` with one scale a row, decoded `[out, in]`: `Q(W_k + (W - W^)_{<k} U_{<k,k})`."""
    feedback = ldl_feedback(hessian)
    high = 2 ** (bits - 1) - 1
    scale = np.float16(np.abs(weight).max(1) / high).astype(np.float64)
    decoded = np.zeros_like(weight)
    for k in range(weight.shape[1]):
        wanted = weight[:, k] + (weight[:, :k] - decoded[:, :k]) @ feedback[:k, k]
        decoded[:, k] = scale * np.clip(np.rint(wanted / scale), -high - 1, high)
    return decoded


def quip(
    weight: np.ndarray, gram: np.ndarray, basis_in: np.ndarray, basis_out: np.ndarray, scale: np.ndarray, damping: float
) -> np.ndarray:
    """The effective weight `[out, in]` of 4 bits; `x / scale` times `basis_in` `[in, in]` are the new inputs."""
    hessian = basis_in.T @ (gram / np.outer(scale, scale)) @ basis_in
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    rotated = np.linalg.inv(basis_out) @ (weight * scale) @ np.linalg.inv(basis_in).T
    return basis_out @ ldlq(rotated, hessian, 4) @ basis_in.T / scale
