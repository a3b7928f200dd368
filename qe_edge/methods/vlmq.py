"""VLMQ (2025): GPTQ whose Hessian weighs every token by the gradient of the loss at the layer's output.

`H = X diag(g) X^T` with `g` the magnitude of a token's gradient: redundant tokens, of pictures above all, count little.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from qe_edge.methods.gptq import GPTQ, GPTQOptions
from qe_edge.reconstruction.token_weights import gradient_weights


class VLMQOptions(GPTQOptions):
    """Options of VLMQ.

    Attributes:
        power: Of the gradient's magnitude in a token's weight; 2 is the diagonal of the Fisher information.
        evenness: Share of the weight that all tokens have alike.
    """

    power: float = Field(1.0, gt=0, le=2)
    evenness: float = Field(0.1, ge=0, le=1)


class VLMQ(GPTQ):
    """Importance-aware second-order rounding."""

    Options = VLMQOptions
    options: VLMQOptions

    @property
    def weighs_tokens(self) -> bool:
        """It is the method."""
        return True

    def token_weights(self, energy: np.ndarray) -> np.ndarray:
        """Magnitudes of the gradients, to a power."""
        return gradient_weights(energy, self.options.power, self.options.evenness)
