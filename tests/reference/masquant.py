"""MASQuant with the formula's scales in float64, one token at a time, whitened by an explicit square root."""

from __future__ import annotations

import numpy as np

from tests.reference.grids import quantize_matrix, quantize_tokens


def masquant(
    weight: np.ndarray, tokens: np.ndarray, image: np.ndarray, alpha: float, bits: tuple[int, int], rank: int
) -> np.ndarray:
    """Outputs `[n, out]` with a scale for either modality, one weight per channel for text, and a pair for images.

    Args:
        weight: `[out, in]`.
        tokens: `[n, in]`, both modalities.
        image: `[n]` bool.
        alpha: Of SmoothQuant's formula.
        bits: Of weights and activations.
        rank: Of the pair.
    """
    text, other = (smoothing(weight, tokens[mask], alpha) for mask in (~image, image))
    codes = quantize_matrix(weight * text, bits[0], None, symmetric=True)
    seen = tokens[image] / other
    values, vectors = np.linalg.eigh(seen.T @ seen / len(seen))
    root = vectors * np.sqrt(np.maximum(values, 0))
    left, sizes, right = np.linalg.svd((weight * other - codes) @ root, full_matrices=False)
    pair = (left[:, :rank] * sizes[:rank]) @ right[:rank] @ np.linalg.pinv(root)
    outputs = []
    for token, seen_in_picture in zip(tokens, image, strict=True):
        x = token / (other if seen_in_picture else text)
        y = codes @ quantize_tokens(x[None], bits[1])[0]
        outputs.append(y + pair @ x if seen_in_picture else y)
    return np.stack(outputs)


def smoothing(weight: np.ndarray, tokens: np.ndarray, alpha: float) -> np.ndarray:
    """SmoothQuant's scale `[in]`, as float16 stores its inverse."""
    scale = np.abs(tokens).max(0) ** alpha / np.abs(weight).max(0) ** (1 - alpha)
    return 1 / np.float16(1 / scale).astype(np.float64)
