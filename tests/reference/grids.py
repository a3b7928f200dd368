"""The rounding rules of docs/method.md, section 3, one scalar at a time."""

from __future__ import annotations

import numpy as np


def quantize_row(row: np.ndarray, bits: int, *, symmetric: bool) -> np.ndarray:
    """Fake-quantize one scale group; the scale is rounded to float16, as it is stored."""
    high = 2 ** (bits - 1) - 1
    if symmetric:
        scale = float(np.float16(max(np.abs(row).max(), 1e-5) / high))
        return np.array([scale * min(max(round(float(v) / scale), -high - 1), high) for v in row])
    largest, smallest = max(row.max(), 0.0), min(row.min(), 0.0)
    scale = float(np.float16(max(largest - smallest, 1e-5) / (2**bits - 1)))
    zero = min(max(round(-smallest / scale), 0), 2**bits - 1)
    codes = [min(max(round(float(v) / scale) + zero, 0), 2**bits - 1) for v in row]
    return np.array([scale * (code - zero) for code in codes])


def quantize_matrix(weight: np.ndarray, bits: int, group: int | None, *, symmetric: bool) -> np.ndarray:
    """Fake-quantize a weight matrix `[out, in]` group by group."""
    size = group or weight.shape[1]
    groups = weight.reshape(-1, size)
    return np.stack([quantize_row(row, bits, symmetric=symmetric) for row in groups]).reshape(weight.shape)


def quantize_tokens(tokens: np.ndarray, bits: int) -> np.ndarray:
    """Per-token symmetric fake quantization of `[n, in]` with float32 scales."""
    high = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(tokens).max(1, keepdims=True), 1e-5) / high
    return np.clip(np.rint(tokens / scale), -high - 1, high) * scale
