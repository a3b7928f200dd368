"""SmoothQuant (ICML 2023): outliers move from activations to weights by one scale per input channel.

The scale is an operand of our layer, so every linear can be smoothed. The original folds it into a norm before the
layer, and therefore smooths only layers that follow a norm.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import MethodOptions
from qe_edge.methods.scaling import ChannelScaling
from qe_edge.numerics.channel_scales import storable_inverse
from qe_edge.numerics.grids import quantize_weight
from qe_edge.reconstruction.problem import LinearProblem

SMALLEST = 1e-5


class SmoothQuantOptions(MethodOptions):
    """Options of SmoothQuant.

    Attributes:
        alpha: Share of the activations' range that moves to the weights; 0.75 to 0.85 helps some models.
    """

    alpha: float = Field(0.5, ge=0, le=1)


class SmoothQuant(ChannelScaling[SmoothQuantOptions]):
    """`s_c = max|x_c|^alpha / max|w_c|^(1 - alpha)` over all layers that read the same input.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers
        >>> recipe = qe_edge.make_recipe(method="smoothquant", scheme="w4a16", options={"alpha": 0.5})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.082  # method rtn: 0.09
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """Channel maxima, which always come along."""
        return StatisticsRequest(gram=False, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Smooth, then round."""
        largest = problem.weight.abs().amax(0).double().numpy()
        scale = smoothing_scale(problem.measured().abs_max, largest, self.options.alpha)
        inv_omega = storable_inverse(scale)
        weight = quantize_weight(problem.weight / inv_omega.float(), problem.scheme.weight)
        return QuantizedLinear(weight, problem.scheme.activation_bits, inv_omega)


def smoothing_scale(activation: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """The scale `[in]` float64 from the largest magnitudes of activations and weights, each `[in]`.

    Example:
        >>> smoothing_scale(np.array([100.0, 1.0]), np.array([1.0, 1.0]), alpha=0.5)
        array([10.,  1.])
    """
    scale: np.ndarray = np.maximum(activation, SMALLEST) ** alpha / np.maximum(weight, SMALLEST) ** (1 - alpha)
    return scale
