"""AWQ and SmoothQuant in float64, one candidate and one token at a time."""

from __future__ import annotations

import numpy as np

from tests.reference.grids import quantize_matrix


def rounded_with(weight: np.ndarray, scale: np.ndarray, bits: int, group: int | None, *, symmetric: bool) -> np.ndarray:
    """The weight `[out, in]` that a layer computes with whose input is divided by `scale` `[in]`, stored in float16."""
    stored = np.float16(1 / scale).astype(np.float64)
    return quantize_matrix(weight / stored, bits, group, symmetric=symmetric) * stored


def smoothquant(
    weight: np.ndarray, tokens: np.ndarray, alpha: float, bits: int, group: int | None, *, symmetric: bool
) -> np.ndarray:
    """SmoothQuant's effective weight `[out, in]`: `s_c = max|x_c|^alpha / max|w_c|^(1 - alpha)`."""
    scale = np.array(
        [
            max(np.abs(tokens[:, c]).max(), 1e-5) ** alpha / max(np.abs(weight[:, c]).max(), 1e-5) ** (1 - alpha)
            for c in range(weight.shape[1])
        ]
    )
    return rounded_with(weight, scale, bits, group, symmetric=symmetric)


def awq(
    weight: np.ndarray, tokens: np.ndarray, steps: int, bits: int, group: int | None, *, symmetric: bool
) -> tuple[np.ndarray, list[float]]:
    """AWQ's effective weight `[out, in]`, and the squared output error on all tokens of every candidate power."""
    mean = np.abs(tokens).mean(0)
    candidates, losses = [], []
    for step in range(steps):
        scale = np.maximum(mean ** (step / steps), 1e-4)
        scale = scale / np.sqrt(scale.max() * scale.min())
        candidates.append(rounded_with(weight, scale, bits, group, symmetric=symmetric))
        losses.append(float(sum(np.square((weight - candidates[-1]) @ token).sum() for token in tokens)))
    return candidates[int(np.argmin(losses))], losses
