"""A method of your own: round to nearest, after clipping the largest weights of every row.

pip install examples/07_own_method
qe-edge quantize demo -o out/clipped --method clipped --set quantile=0.99
"""

from pydantic import Field

from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods import LinearProblem, Method, MethodOptions
from qe_edge.numerics.grids import quantize_weight


class ClippedOptions(MethodOptions):
    """Options of the method; `--set quantile=0.99` and a recipe's `options` change them.

    Attributes:
        quantile: Share of a row's weights that keep their size.
    """

    quantile: float = Field(0.999, gt=0, le=1)


class ClippedRounding(Method[ClippedOptions]):
    """The largest weights of every row are clipped, so that the others get a finer grid."""

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Clip and round the weight `[out, in]` of `problem`."""
        limit = problem.weight.abs().quantile(self.options.quantile, dim=1, keepdim=True)
        weight = quantize_weight(problem.weight.clamp(-limit, limit), problem.scheme.weight)
        return QuantizedLinear(weight=weight, activation_bits=problem.scheme.activation_bits)
