"""LQER (ICML 2024): low-rank reconstruction of the error, weighted by the mean magnitude of every input channel.

The branch reads the unquantized input, as our operator has it; the original feeds it the quantized one.
"""

from __future__ import annotations

import numpy as np

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.static import StaticCorrection, StaticOptions
from qe_edge.reconstruction.branches import leave_out_channels, static_correction
from qe_edge.reconstruction.directions import diagonal_directions
from qe_edge.reconstruction.problem import LinearProblem

SMALLEST_SCALE = 1e-4


class LQER(StaticCorrection[StaticOptions]):
    """Truncated SVD of `E diag(mean |x|)`.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers
        >>> recipe = qe_edge.make_recipe(method="lqer", scheme="w4a16", options={"rank": 16})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.035  # method rtn: 0.09
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """Channel means, which always come along."""
        return StatisticsRequest(gram=False, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round, then correct the rounding error."""
        abs_mean = problem.measured().abs_mean
        nothing = np.zeros(0, np.int64)
        branch = leave_out_channels(problem.weight, problem.scheme.weight, nothing, abs_mean, "drop")
        scale = np.maximum(abs_mean, SMALLEST_SCALE)
        directions = diagonal_directions(branch.error, scale, self.rank(*problem.weight.shape))
        adapters = static_correction(branch.error, directions, self.options.adapter_dtype)
        return QuantizedLinear(branch.weight, problem.scheme.activation_bits, None, adapters)
