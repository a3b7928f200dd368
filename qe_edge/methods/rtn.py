"""Round to nearest: the baseline without calibration or correction."""

from __future__ import annotations

from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import quantize_weight
from qe_edge.reconstruction.problem import LinearProblem


class RoundToNearest(Method[MethodOptions]):
    """Every weight goes to the nearest code of its grid; activations are quantized per token."""

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round the weight of `problem` to its grid."""
        weight = quantize_weight(problem.weight, problem.scheme.weight)
        return QuantizedLinear(weight=weight, activation_bits=problem.scheme.activation_bits)
