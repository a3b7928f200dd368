"""OBQ literally: the inverse of the remaining weights' Hessian is computed anew before every weight, in float64."""

from __future__ import annotations

import numpy as np


def obq_row(
    row: np.ndarray, hessian: np.ndarray, scale: np.ndarray, zero: np.ndarray, limits: tuple[int, int]
) -> np.ndarray:
    """Decoded weights `[in]` of one output on given scales and zero points `[in]`."""
    w, decoded = row.copy(), np.zeros_like(row)
    remaining = list(range(len(row)))
    while remaining:
        inverse = np.linalg.inv(hessian[np.ix_(remaining, remaining)])
        quantized = [(np.clip(np.rint(w[c] / scale[c]) + zero[c], *limits) - zero[c]) * scale[c] for c in remaining]
        errors = w[remaining] - np.array(quantized)
        outside = np.abs(errors) > 0.5001 * scale[remaining]
        place = int(np.argmax(np.abs(errors) * outside))
        if not outside.any():
            place = int(np.argmin(errors**2 / np.diag(inverse)))
        decoded[remaining[place]] = quantized[place]
        w[remaining] -= errors[place] / inverse[place, place] * inverse[:, place]
        del remaining[place]
    return decoded
