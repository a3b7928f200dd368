"""SpQR weight by weight: the Hessian of the columns to come is inverted anew for each column, in float64."""

from __future__ import annotations

import numpy as np

from tests.reference.grids import quantize_row


def spqr(
    weight: np.ndarray, hessian: np.ndarray, bits: int, group: int, share: float, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Decoded weight with its outliers `[out, in]`, and where these are."""
    out, size = weight.shape
    inverses = [np.linalg.inv(hessian[c:, c:]) for c in range(size)]  # of the columns from c on
    pivots = np.array([inverse[0, 0] for inverse in inverses])

    def cost(row: np.ndarray, first: int) -> float:
        errors = quantize_row(row, bits, symmetric=symmetric) - row
        return float((errors**2 / pivots[first : first + len(row)]).sum())

    def savings(columns: np.ndarray, first: int) -> np.ndarray:
        """What a row costs, less what it costs with one weight put to zero, whose error is zero then."""
        without = [[np.where(np.arange(len(row)) == i, 0.0, row) for i in range(len(row))] for row in columns]
        return np.array(
            [
                [cost(row, first) - cost(other, first) for other in others]
                for row, others in zip(columns, without, strict=True)
            ]
        )

    plain = np.concatenate([savings(weight[:, first : first + group], first) for first in range(0, size, group)], 1)
    threshold = np.sort(plain, axis=None)[plain.size - round(share * plain.size) - 1]
    w, decoded, outliers = weight.copy(), np.zeros_like(weight), np.zeros(weight.shape, bool)
    for first in range(0, size, group):
        span = slice(first, first + group)
        outliers[:, span] = savings(w[:, span], first) > threshold
        kept = np.where(outliers[:, span], 0.0, w[:, span])
        grids = [grid_of(row, bits, symmetric=symmetric) for row in kept]
        for c in range(first, first + group):
            for row in range(out):
                scale, zero, low, high = grids[row]
                value = (np.clip(np.rint(w[row, c] / scale) + zero, low, high) - zero) * scale
                decoded[row, c] = value + np.float64(np.float16(w[row, c] - value)) if outliers[row, c] else value
                w[row, c:] -= (w[row, c] - decoded[row, c]) / pivots[c] * inverses[c][0]
    return decoded, outliers


def grid_of(row: np.ndarray, bits: int, *, symmetric: bool) -> tuple[float, float, int, int]:
    """Scale, zero point, and limits of the codes, of one scale group."""
    if symmetric:
        high = 2 ** (bits - 1) - 1
        return float(np.float16(max(np.abs(row).max(), 1e-5) / high)), 0.0, -high - 1, high
    largest, smallest = max(row.max(), 0.0), min(row.min(), 0.0)
    scale = float(np.float16(max(largest - smallest, 1e-5) / (2**bits - 1)))
    return scale, float(np.clip(np.rint(-smallest / scale), 0, 2**bits - 1)), 0, 2**bits - 1
