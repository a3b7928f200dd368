"""What the baselines with one scale per input channel share."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qe_edge.methods.base import Method

LARGEST_SCALE = 1e3  # either way: far inside float16's range


class ChannelScaling(Method):
    """A method that moves one scale per input channel from activations to weights."""

    @property
    def stack_siblings(self) -> bool:
        """One scale for all consumers of an input."""
        return True


def storable_inverse(scale: np.ndarray) -> Tensor:
    """`1 / scale` `[in]` float16, as the layer multiplies its input; codes are made for this rounded value."""
    return torch.from_numpy(1.0 / np.clip(scale, 1 / LARGEST_SCALE, LARGEST_SCALE)).to(torch.float16)
