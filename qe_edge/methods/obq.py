"""OBQ (NeurIPS 2022): the weight of a row whose rounding costs least is rounded next, and the others make up for it.

Exact and greedy: every output channel has its own order and its own inverse Hessian, which loses a row and a column
with every weight. That is cubic in the inputs for each output, so only small layers are accepted. The same authors made
GPTQ of it for large layers.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from scipy.linalg.blas import dsyr

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import QuantizedWeight, WeightGrid, scales_of_range, split_groups
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.range_search import search_range
from qe_edge.system.errors import NumericalError, RecipeError
from qe_edge.system.parallel import map_rows

MAX_INPUTS, MAX_WEIGHTS = 2048, 1 << 20  # minutes on a CPU's core
ROWS = 16  # output channels that one thread takes at a time


class OBQOptions(MethodOptions):
    """Options of OBQ.

    Attributes:
        damping: Added to the Hessian's diagonal, relative to its mean.
        clip: Search the range of every scale, before any weight is rounded.
    """

    damping: float = Field(0.01, gt=0, le=1)
    clip: bool = True


class OBQ(Method[OBQOptions]):
    """Greedy second-order rounding, one weight at a time.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="obq", scheme="w4a16", options={"clip": True})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.056  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def check_shape(self, name: str, out_features: int, in_features: int) -> None:
        """Refuse layers that would take hours.

        Raises:
            RecipeError: Naming the layer.
        """
        if in_features > MAX_INPUTS or out_features * in_features > MAX_WEIGHTS:
            raise RecipeError(
                f"'{name}' [{out_features}, {in_features}] is too large for OBQ, which takes at most {MAX_INPUTS} "
                f"inputs and {MAX_WEIGHTS} weights.",
                "Choose method gptq, which rounds all outputs in one order.",
            )

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round the weight of `problem`, every output channel in its own order."""
        weight = obq_round(
            problem.weight, problem.gram(), problem.scheme.weight, self.options.damping, clip=self.options.clip
        )
        return QuantizedLinear(weight, problem.scheme.activation_bits)


def obq_round(
    weight: torch.Tensor, gram: np.ndarray, grid: WeightGrid, damping: float, *, clip: bool
) -> QuantizedWeight:
    """Codes of a weight `[out, in]` float32 under the Gram matrix `[in, in]`.

    Args:
        weight: Float32.
        gram: `X^T X` up to a factor.
        grid: Grid of the codes; scales come from the original weights.
        damping: Relative to the mean of the Gram matrix's diagonal.
        clip: Search the range of every scale.

    Raises:
        NumericalError: If the damped Gram matrix is not positive definite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(8, 32), torch.randn(200, 32)
        >>> obq_round(weight, (tokens.T @ tokens / 200).numpy(), WeightGrid(4), damping=0.01, clip=True).codes.shape
        torch.Size([8, 32])
    """
    diagonal = np.diag(gram).copy()
    dead = (diagonal == 0) & bool(diagonal.any())
    kept = weight.float().masked_fill(torch.from_numpy(dead), 0.0)
    groups = split_groups(kept, grid)
    scales, zeros = (
        search_range(kept, grid, torch.from_numpy(diagonal).float())
        if clip
        else scales_of_range(groups.amin(-1), groups.amax(-1), grid)
    )
    inverse = _inverse(gram, damping)
    w, width = kept.double().numpy(), groups.shape[2]
    step = np.repeat(scales.double().numpy(), width, axis=1)
    point = np.zeros_like(step) if zeros is None else np.repeat(zeros.double().numpy(), width, axis=1)

    def rows(part: slice) -> np.ndarray:
        found = [greedy_row(*row, inverse, grid.limits) for row in zip(w[part], step[part], point[part], strict=True)]
        return np.stack(found)

    codes = torch.from_numpy(np.concatenate(map_rows(rows, len(w), ROWS)))
    return QuantizedWeight(codes, scales, zeros, grid.bits, grid.resolve_group(weight.shape[1]))


def greedy_row(
    weight: np.ndarray, step: np.ndarray, point: np.ndarray, inverse: np.ndarray, limits: tuple[int, int]
) -> np.ndarray:
    """Codes int8 `[in]` of one output channel.

    Args:
        weight: `[in]` float64.
        step: `[in]` scale of every weight.
        point: `[in]` zero point of every weight.
        inverse: `[in, in]` of the Hessian.
        limits: Smallest and largest code.

    Example:
        >>> weight, step, point = np.array([0.7, 1.2]), np.full(2, 0.5), np.zeros(2)
        >>> greedy_row(weight, step, point, np.eye(2), limits=(-8, 7))
        array([1, 2], dtype=int8)
    """
    codes = np.zeros(len(weight), np.int8)
    left = np.arange(len(weight))  # weights that are not rounded yet
    w, inverse = weight.copy(), np.array(inverse, order="F")  # its own, which changes
    while len(left):
        count = -(-len(left) // 4)  # after so many the matrix is made smaller
        open_ = np.ones(len(left), bool)
        for _ in range(count):
            code = np.clip(np.rint(w / step) + point, *limits)
            error = w - (code - point) * step
            beyond = open_ & (np.abs(error) > 0.5001 * step)
            if beyond.any():  # a weight that has left its range is rounded at once, before it moves on
                chosen = int(np.argmax(np.abs(error) * beyond))
            else:
                chosen = int(np.argmin(np.where(open_, error**2 / inverse.diagonal(), np.inf)))
            column = np.concatenate((inverse[chosen, :chosen], inverse[chosen:, chosen]))  # of the lower triangle
            codes[left[chosen]] = code[chosen]
            w -= error[chosen] / column[chosen] * column
            inverse = dsyr(-1.0 / column[chosen], column, a=inverse, lower=1, overwrite_a=1)
            inverse[chosen, chosen] = 1.0  # no longer read
            open_[chosen] = False
        numbers = np.flatnonzero(open_)
        left, w, step, point = left[numbers], w[numbers], step[numbers], point[numbers]
        inverse = np.asfortranarray(inverse[np.ix_(numbers, numbers)])
    return codes


def _inverse(gram: np.ndarray, damping: float) -> np.ndarray:
    """The inverse `[in, in]` float64 of the damped Gram matrix; channels without input get a diagonal of one."""
    hessian = gram.astype(np.float64)
    diagonal = np.diag(hessian).copy()
    diagonal[diagonal == 0] = 1.0
    hessian[np.diag_indices_from(hessian)] = diagonal + damping * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(hessian))
    if failed:
        raise NumericalError("The Gram matrix is not positive definite.", "Raise the option 'damping'.")
    return torch.cholesky_inverse(factor).numpy()
