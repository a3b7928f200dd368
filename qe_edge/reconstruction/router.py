"""Router initialisation: scores on |x| that predict every expert's residual (specification 7)."""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve

KINDS = ("ridge", "tri")
RIDGE = 1e-2  # damping relative to the mean diagonal of |X||X|^T


def triangle_router(error: np.ndarray, corrections: list[np.ndarray]) -> np.ndarray:
    """`R_ic = mean_o |E_S - L_i|_oc`: an upper bound of the mean absolute residual of expert i, free of data.

    Args:
        error: `[out, in]`, what the shared expert left.
        corrections: For every expert its correction `[out, in]`.

    Returns:
        `[experts, in]` float64.
    """
    return np.stack([np.abs(error - correction).mean(0) for correction in corrections])


def ridge_router(tokens: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Ridge regression from |x| to the centred residual of every expert.

    Args:
        tokens: `[n, in]` calibration tokens.
        residuals: `[n, experts]` mean absolute residual of every expert on every token.

    Returns:
        `[experts, in]` float64.
    """
    magnitude = np.abs(tokens).astype(np.float64)
    normal = magnitude.T @ magnitude
    damping = RIDGE * np.trace(normal) / len(normal)
    if damping <= 0:
        return np.zeros((residuals.shape[1], tokens.shape[1]))
    normal[np.diag_indices_from(normal)] += damping
    centred = residuals - residuals.mean(1, keepdims=True)
    weights: np.ndarray = solve(normal, magnitude.T @ centred, assume_a="pos").T
    return weights


def token_residuals(
    tokens: np.ndarray, error: np.ndarray, ups: list[np.ndarray], downs: list[np.ndarray], chunk: int = 2048
) -> np.ndarray:
    """Mean absolute residual `(1/out) ||(E_S - L_i) x||_1` `[n, experts]`, with `L_i = up_i @ down_i`.

    Computed in the precision of `tokens`; float32 is ample for scores that a ridge regression smooths anyway.
    """
    error_t = error.T.astype(tokens.dtype)
    factors = [(up.T.astype(tokens.dtype), down.T.astype(tokens.dtype)) for up, down in zip(ups, downs, strict=True)]
    result = np.empty((len(tokens), len(ups)))
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        outputs = part @ error_t
        for expert, (up_t, down_t) in enumerate(factors):
            result[start : start + chunk, expert] = np.abs(outputs - (part @ down_t) @ up_t).mean(1)
    return result


def normalise_router(router: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Scale all scores by one factor so that they spread by about 1 over the experts; the argmin stays the same."""
    spread = (np.abs(tokens) @ router.T).std(1).mean() if len(tokens) else 0.0
    return router / spread if spread > 0 else router
