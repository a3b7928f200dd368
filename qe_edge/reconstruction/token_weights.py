"""The weight of an error on every token."""

from __future__ import annotations

import numpy as np


def gradient_weights(energy: np.ndarray, power: float, evenness: float) -> np.ndarray:
    """Weights `[tokens]` float64, mean 1: a power of the gradients' magnitudes, and a share that is the same for all.

    Args:
        energy: `[tokens]` squared gradients at the outputs that read the token.
        power: Power of the magnitude.
        evenness: Share of the weight that is the same for every token, so that every token has some.

    Example:
        >>> gradient_weights(np.array([0.0, 4.0, 16.0]), power=1, evenness=0.5).tolist()
        [0.5, 1.0, 1.5]
    """
    magnitude = energy.astype(np.float64) ** (power / 2)
    mean = float(magnitude.mean())
    if mean == 0:  # the loss does not depend on this layer
        return np.ones(len(energy))
    weights: np.ndarray = evenness + (1 - evenness) * magnitude / mean
    return weights
