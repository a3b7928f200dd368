"""One scale per input channel, which activations are divided by and weights multiplied with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LARGEST_SCALE = 1e3  # either way: far inside float16's range
SMALLEST_SCALE = 1e-4  # of AWQ's and MBQ's search, before it is normalised


def power_scale(abs_mean: np.ndarray, power: float) -> np.ndarray:
    """AWQ's candidate `[in]` float64: a power of the mean magnitudes, so that largest times smallest is 1.

    Example:
        >>> power_scale(np.array([1.0, 4.0, 16.0]), power=0.5).tolist()
        [0.5, 1.0, 2.0]
    """
    scale: np.ndarray = np.maximum(np.maximum(abs_mean, 1e-12) ** power, SMALLEST_SCALE)
    scale /= np.sqrt(scale.max() * scale.min())
    return scale


def storable_inverse(scale: np.ndarray) -> Tensor:
    """`1 / scale` `[in]` float16, as the layer multiplies its input; codes are made for this rounded value.

    Example:
        >>> storable_inverse(np.array([0.5, 1.0, 4.0]))
        tensor([2.0000, 1.0000, 0.2500], dtype=torch.float16)
    """
    return torch.from_numpy(1.0 / np.clip(scale, 1 / LARGEST_SCALE, LARGEST_SCALE)).to(torch.float16)
