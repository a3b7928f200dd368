"""Scaling of 8-bit frames as torch does it on a CPU, equal to the last bit; transformers scales videos so.

torch's `interpolate(..., antialias=True)` on uint8 has Pillow's filters. Its weights are rounded to the largest number
of bits at which they fit into 16, columns are always scaled first, and pixels of 8 bits stand between the two passes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LANCZOS, BILINEAR, BICUBIC = 1, 2, 3  # Pillow's numbers of filters
MOST_BITS = 22
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
    across = _one_axis(frames, 2, width, resample)
    return _one_axis(across, 1, height, resample)


def _one_axis(frames: np.ndarray, axis: int, size: int, resample: int) -> np.ndarray:
    """Scale one axis; frames one by one, so that whole numbers of 32 bits take the memory of one."""
    if frames.shape[axis] == size:
        return frames
    places, weights, bits = _weights(frames.shape[axis], size, resample)
    shape = (*frames.shape[:axis], size, *frames.shape[axis + 1 :])
    scaled = np.empty(shape, np.uint8)
    spread = (-1,) + (1,) * (frames.ndim - 1 - axis)
    for frame, target in zip(frames, scaled, strict=True):
        total = np.full(shape[1:], 1 << (bits - 1), np.int32)
        for place, weight in zip(places.T, weights.T, strict=True):
            total += np.take(frame, place, axis=axis - 1) * weight.reshape(spread)
        target[:] = np.clip(total >> bits, 0, 255)
    return scaled


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
