"""AWQ (MLSys 2024): salient input channels are scaled up before rounding, by a searched power of their magnitude.

The search minimises the output error of the layers that read the input (the original: of their attention or MLP
module), through the Gram matrix and so over all calibration tokens. The scale is an operand of our layer; there is no
search for a clipping range.
"""

from __future__ import annotations

import torch
from pydantic import Field

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import MethodOptions
from qe_edge.methods.scaling import ChannelScaling
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.rounding import search_scale


class AWQOptions(MethodOptions):
    """Options of AWQ.

    Attributes:
        grid: Number of powers tried, evenly from 0 towards 1.
    """

    grid: int = Field(20, ge=1, le=100)


class AWQ(ChannelScaling[AWQOptions]):
    """Activation-aware channel scales, one search per shared input.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers
        >>> recipe = qe_edge.make_recipe(method="awq", scheme="w4a16", options={"grid": 20})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.08  # method rtn: 0.09
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """Channel means and the Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Search the scale, then round."""
        weight, inv_omega = search_scale(
            problem.weight,
            problem.measured().abs_mean,
            torch.from_numpy(problem.gram()).float(),
            problem.scheme.weight,
            self.options.grid,
        )
        return QuantizedLinear(weight, problem.scheme.activation_bits, inv_omega)
