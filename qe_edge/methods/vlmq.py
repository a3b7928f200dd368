"""VLMQ (2025): GPTQ whose Hessian weighs every token by the gradient of the loss at the layer's output.

`H = X diag(g) X^T` with `g` the magnitude of a token's gradient. Redundant tokens, most of them of pictures, count
little.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from qe_edge.methods.gptq import GPTQ, GPTQOptions
from qe_edge.reconstruction.token_weights import gradient_weights


class VLMQOptions(GPTQOptions):
    """Options of VLMQ.

    Attributes:
        power: Power of the gradient's magnitude in a token's weight; 2 is the diagonal of the Fisher information.
        evenness: Share of the weight that is the same for all tokens.
    """

    power: float = Field(1.0, gt=0, le=2)
    evenness: float = Field(0.1, ge=0, le=1)


class VLMQ(GPTQ):
    """Importance-aware second-order rounding.

    Example:
        >>> VLMQ(VLMQOptions(power=1, evenness=0.5)).token_weights(np.array([0.0, 4.0, 16.0]))
        array([0.5, 1. , 1.5])
    """

    Options = VLMQOptions
    options: VLMQOptions

    @property
    def weighs_tokens(self) -> bool:
        """Always."""
        return True

    def token_weights(self, energy: np.ndarray) -> np.ndarray:
        """Magnitudes of the gradients, to a power."""
        return gradient_weights(energy, self.options.power, self.options.evenness)
