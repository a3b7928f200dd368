"""aespa (NeurIPS 2024): query, key and value layers are rounded for the attention, the others as GPTQ does.

An error `E` of a query layer changes the scores of a head by `K E x`, so what it costs is `tr(B E H E^T)`: `H` is the
Gram matrix of the layer's inputs, and `B` that of the keys. For a key layer `B` is the Gram matrix of the queries.
An error of a value layer reaches the output through the attention's weights `A`: its Hessian is `X^T A^T A X`, one for
every head.

With `B = S S^T` and `H = R R^T`, both factors upper triangular, the cost is the sum of squares of `S^T E R`. So the
rows of a head are rounded in turn, each by GPTQ, after adding what rows before it make up for: `S_ia / S_aa` of the
error of row i. The original trains the rounding of each weight (AdaRound) on the same cost instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.gptq import GPTQ, GPTQOptions
from qe_edge.numerics.grids import QuantizedWeight, WeightGrid
from qe_edge.numerics.matrices import Matrix
from qe_edge.reconstruction.gptq import Hessian, gptq_round
from qe_edge.reconstruction.problem import LinearProblem


class AespaOptions(GPTQOptions):
    """Options of aespa.

    Attributes:
        scores: Round query and key layers for the attention's scores; False rounds them as GPTQ does.
        values: Round value layers for the attention's output; False rounds them as GPTQ does.
    """

    scores: bool = True
    values: bool = True


class Aespa(GPTQ):
    """Second-order rounding for the attention's scores and outputs.

    Example:
        >>> import qe_edge
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> layer = qe_edge.quantize_linear(weight, tokens, qe_edge.make_recipe(method="aespa"))
        >>> alone = qe_edge.quantize_linear(weight, tokens, qe_edge.make_recipe(method="gptq"))
        >>> torch.equal(layer.codes(), alone.codes())  # one layer alone has no attention
        True
    """

    Options = AespaOptions
    options: AespaOptions

    @property
    def sees_attention(self) -> bool:
        """It is the method, unless its options leave nothing of it."""
        return self.options.scores or self.options.values

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round the weight of `problem` for the attention that reads its output, if there is one."""
        heads, grid, damping = problem.heads, problem.scheme.weight, self.options.damping
        if heads is not None and heads.outputs is not None and self.options.scores:
            weight = round_rows(problem.weight, problem.gram(), heads.outputs, grid, damping)
        elif heads is not None and heads.inputs and self.options.values:
            parts = problem.weight.chunk(heads.count)
            weight = joined(
                [gptq_round(part, gram, grid, damping) for part, gram in zip(parts, heads.inputs, strict=True)]
            )
        else:
            return super().quantize(problem)
        return QuantizedLinear(weight, problem.scheme.activation_bits)


def round_rows(weight: Tensor, gram: Matrix, outputs: Tensor, grid: WeightGrid, damping: float) -> QuantizedWeight:
    """Codes that lose little of `tr(B E H E^T)`, E their error, summed over heads.

    Args:
        weight: `[heads * width, in]` float32.
        gram: `[in, in]`, `H` up to a factor.
        outputs: `[heads, width, width]` float64, every head's `B` up to a factor.
        grid: Grid of the codes.
        damping: Added to the diagonals of both, relative to their means.

    Raises:
        NumericalError: If a damped matrix is not positive definite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight, gram, keys = torch.randn(8, 16), torch.eye(16), torch.randn(2, 3, 4).double()
        >>> outputs, grid = keys.transpose(1, 2) @ keys, WeightGrid(3)
        >>> def lost(codes: QuantizedWeight) -> float:
        ...     error = (codes.decode() - weight).double().view(2, 4, 16)
        ...     return float((keys @ error).square().sum())
        >>> lost(round_rows(weight, gram, outputs, grid, 0.01)) < 0.6 * lost(gptq_round(weight, gram, grid, 0.01))
        True
    """
    count, width, _ = outputs.shape
    hessian = Hessian(gram)
    shares = torch.stack([Hessian(one).coupling(damping) for one in outputs]).to(weight.device)  # S_ia / S_aa
    rows = weight.float().view(count, width, -1)
    errors = torch.zeros_like(rows)
    found = []
    for row in range(width):
        made_up = torch.einsum("hi,hij->hj", shares[:, :row, row], errors[:, :row])
        found.append(gptq_round(rows[:, row] - made_up, hessian, grid, damping))
        errors[:, row] = found[-1].decode() - rows[:, row]
    return joined(found, across=count)


def joined(parts: list[QuantizedWeight], across: int = 0) -> QuantizedWeight:
    """One weight of several: one below the other, or, `across` so many heads, the first rows of all parts first.

    Example:
        >>> from qe_edge.numerics.grids import quantize_weight
        >>> weight = torch.tensor([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0], [4.0, 7.0]])
        >>> parts = [quantize_weight(weight[start::2], WeightGrid(4)) for start in (0, 1)]
        >>> joined(parts).codes[:, 0].tolist(), joined(parts, across=2).codes[:, 0].tolist()
        ([1, 3, 2, 4], [1, 2, 3, 4])
    """

    def join(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors, 1).flatten(0, 1) if across else torch.cat(tensors)

    first = parts[0]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedWeight(
        join([part.codes for part in parts]),
        join([part.scales for part in parts]),
        join(zeros) if zeros else None,
        first.bits,
        first.group_size,
    )
