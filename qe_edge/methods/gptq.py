"""GPTQ (ICLR 2023): columns are rounded one after the other, and later columns make up for the error of each.

The scheme gives groups and scales. The method's own flow is sequential (`flow: sequential` in the recipe).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.problem import LinearProblem


class GPTQOptions(MethodOptions):
    """Options of GPTQ.

    Attributes:
        damping: Added to the Hessian's diagonal, relative to its mean.
    """

    damping: float = Field(0.01, gt=0, le=1)


class GPTQ(Method[GPTQOptions]):
    """Second-order rounding with the input's Gram matrix as Hessian.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="gptq", scheme="w4a16", options={"damping": 0.01})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.054  # method rtn: 0.10
        True
    """

    on_device: ClassVar[bool] = True

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round the weight of `problem` column by column."""
        grid = problem.scheme.weight
        weight = gptq_round(problem.weight, problem.gram(), grid, self.options.damping)
        return QuantizedLinear(weight, problem.scheme.activation_bits)
