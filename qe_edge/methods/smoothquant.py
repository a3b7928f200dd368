"""SmoothQuant (ICML 2023): outliers move from activations to weights by one scale per input channel.

The scale is an operand of our layer, so every linear can be smoothed; the original folds it into a norm before the
layer and therefore smooths only those that follow one.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.grids import quantize_weight
from qe_edge.linear import QuantizedLinear
from qe_edge.methods.base import LinearProblem, Method, MethodOptions
from qe_edge.methods.static import measured

SMALLEST = 1e-5


class SmoothQuantOptions(MethodOptions):
    """Options of SmoothQuant.

    Attributes:
        alpha: How much of the difficulty moves to the weights; 0.75 to 0.85 helps some models.
    """

    alpha: float = Field(0.5, ge=0, le=1)


class SmoothQuant(Method):
    """`s_c = max|x_c|^alpha / max|w_c|^(1 - alpha)` over all layers that read the same input."""

    Options: ClassVar[type[MethodOptions]] = SmoothQuantOptions
    options: SmoothQuantOptions

    @property
    def stack_siblings(self) -> bool:
        """One scale for all consumers of an input."""
        return True

    def request(self, out_features: int, in_features: int) -> StatisticsRequest | None:  # noqa: ARG002
        """Channel maxima; the Gram matrix only as evidence that there was data."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Smooth, then round."""
        statistics, _ = measured(problem)
        largest = problem.weight.abs().amax(0).double().numpy()
        scale = smoothing_scale(statistics.abs_max, largest, self.options.alpha)
        inv_omega = torch.from_numpy(1.0 / scale).to(torch.float16)
        weight = quantize_weight(problem.weight / inv_omega.float(), problem.scheme.weight)
        return QuantizedLinear(weight, problem.scheme.activation_bits, inv_omega)


def smoothing_scale(activation: np.ndarray, weight: np.ndarray, alpha: float) -> np.ndarray:
    """The scale `[in]` from the maxima of activations and weights; inside float16's range with room to spare."""
    scale = np.maximum(activation, SMALLEST) ** alpha / np.maximum(weight, SMALLEST) ** (1 - alpha)
    limited: np.ndarray = np.clip(scale, 1e-3, 1e3)
    return limited
