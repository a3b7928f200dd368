"""Scaling of 8-bit frames as torch does it on a CPU, equal to the last bit; transformers scales videos so.

torch's `interpolate(..., antialias=True)` on uint8 has Pillow's filters. Its weights are rounded to the largest number
of bits at which they fit into 16, columns are always scaled first, and pixels of 8 bits stand between the two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

LANCZOS, BILINEAR, BICUBIC = 1, 2, 3  # Pillow's numbers of filters
MOST_BITS = 22
BLOCK = 16  # outputs computed together
Weights = tuple[np.ndarray, np.ndarray, int]


def scale_frames(frames: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Scale frames with antialiasing.

    Args:
        frames: uint8 `[frames, height, width, channels]`.
        height: New height.
        width: New width.
        resample: A key of `FILTERS`.

    Returns:
        uint8 `[frames, height, width, channels]`.

    Example:
        >>> frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
        >>> scale_frames(frames, 2, 2, BICUBIC)[0, :, :, 0].tolist()
        [[9, 14], [31, 36]]
    """
    columns = _blocks(frames.shape[2], width, resample) if frames.shape[2] != width else []
    rows = _blocks(frames.shape[1], height, resample) if frames.shape[1] != height else []
    scaled = np.empty((len(frames), height, width, frames.shape[3]), np.uint8)
    for frame, target in zip(frames, scaled, strict=True):
        planes = frame.transpose(2, 0, 1).astype(np.float64 if _wide(columns + rows) else np.float32)
        if columns:
            across = np.empty((*planes.shape[:2], width), planes.dtype)
            for block in columns:
                across[..., block.outputs] = _rounded(planes[..., block.inputs] @ block.weights.T, block.bits)
            planes = across
        if rows:
            down = np.empty((planes.shape[0], height, planes.shape[2]), planes.dtype)
            for block in rows:
                down[:, block.outputs] = _rounded(block.weights @ planes[:, block.inputs], block.bits)
            planes = down
        target[:] = planes.transpose(1, 2, 0)
    return scaled


@dataclass(frozen=True)
class _Block:
    """Outputs that are computed together: a product of weights `[outputs, inputs]` with the inputs that they read."""

    outputs: slice
    inputs: slice
    weights: np.ndarray
    bits: int


def _wide(blocks: Sequence[_Block]) -> bool:
    """Whether products need more bits than float32 has for whole numbers."""
    return any(255 * np.abs(block.weights).sum(1).max() + (1 << block.bits) >= 1 << 24 for block in blocks)


def _rounded(products: np.ndarray, bits: int) -> np.ndarray:
    """Whole products in units of 1 / 2^bits as pixels, in place; a division by a power of two is exact."""
    products += 1 << (bits - 1)
    products *= 1 / (1 << bits)
    np.floor(products, out=products)
    return np.clip(products, 0, 255, out=products)


def _blocks(old: int, new: int, resample: int) -> list[_Block]:
    places, weights, bits = _weights(old, new, resample)
    blocks = []
    for start in range(0, new, BLOCK):
        where, share = places[start : start + BLOCK], weights[start : start + BLOCK]
        first, end = int(where.min()), int(where.max()) + 1
        dense = np.zeros((len(where), end - first))
        np.add.at(dense, (np.arange(len(where))[:, None], where - first), share)
        blocks.append(_Block(slice(start, start + len(where)), slice(first, end), dense, bits))
    if _wide(blocks):
        return blocks
    return [replace(block, weights=block.weights.astype(np.float32)) for block in blocks]


def _weights(old: int, new: int, resample: int) -> Weights:
    """Inputs of every output int64 `[new, n]`, their weights int32 `[new, n]`, and the number of bits of 1."""
    reach, kernel = FILTERS[resample]
    scale = old / new
    stretch = max(scale, 1.0)
    center = scale * (np.arange(new) + 0.5)
    first = np.maximum((center - reach * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((center + reach * stretch + 0.5).astype(np.int64), old)
    places = first[:, None] + np.arange(int((end - first).max()))
    raw = kernel(np.abs((places - center[:, None] + 0.5) * (1.0 / stretch)))
    raw = np.where(places < end[:, None], raw, 0.0)
    shares = raw / raw.sum(1, keepdims=True)
    largest, bits = float(shares.max()), 0
    while bits < MOST_BITS and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    scaled = shares * (1 << bits)
    whole = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)
    return np.minimum(places, old - 1), whole, bits


def _bilinear(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - x, 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5, of absolute distances."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(x < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


FILTERS: dict[int, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    LANCZOS: (3.0, _lanczos),
    BILINEAR: (1.0, _bilinear),
    BICUBIC: (2.0, _bicubic),
}
