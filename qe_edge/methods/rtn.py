"""Round to nearest: the baseline without calibration or correction."""

from __future__ import annotations

from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import quantize_weight
from qe_edge.reconstruction.problem import LinearProblem


class RoundToNearest(Method[MethodOptions]):
    """Every weight goes to the nearest code of its grid; activations are quantized per token.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="rtn", scheme="w4a16")
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.15
        True
    """

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round the weight of `problem` to its grid."""
        weight = quantize_weight(problem.weight, problem.scheme.weight)
        return QuantizedLinear(weight=weight, activation_bits=problem.scheme.activation_bits)
