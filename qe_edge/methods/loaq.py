"""LoaQ (2025): the output of every layer matches that of the original model, not only that of the original layer.

A layer of the quantized model reads `X'` where the original reads `X`, and adds its output to a residual stream `R'`
where the original has `R`. The weight that comes closest to the original's state, `R + X W^T = R' + X' V^T`, is

`V = W + ((R - R')^T X' + W (X - X')^T X') (X'^T X')^-1`

and GPTQ rounds it under `X'^T X'`. Only layers that write into the stream have the term of `R`: the output projection
of the attention and the last layer of the MLP. A norm divides their state by its root mean square, so their tokens are
weighed by its inverse square.

Written from the paper's abstract and summaries, and not from its code, which is not published.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.problem import Drift, LinearProblem


class LoaQOptions(MethodOptions):
    """Options of LoaQ.

    Attributes:
        inputs: Share of the difference of the layer's inputs that the weight makes up for; 0 is GPTQ's target.
        residual: The same of the residual stream.
        norm: Weigh tokens by the norm that reads the stream next.
        damping: Added to the Hessian's diagonal, relative to its mean.
    """

    inputs: float = Field(1.0, ge=0, le=1)
    residual: float = Field(1.0, ge=0, le=1)
    norm: bool = True
    damping: float = Field(0.01, gt=0, le=1)


class LoaQ(Method[LoaQOptions]):
    """GPTQ for the output that the original model has there.

    Example:
        >>> import qe_edge
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> layer = qe_edge.quantize_linear(weight, tokens, qe_edge.make_recipe(method="loaq"))
        >>> alone = qe_edge.quantize_linear(weight, tokens, qe_edge.make_recipe(method="gptq"))
        >>> torch.equal(layer.codes(), alone.codes())  # one layer alone has one input
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    @property
    def sees_both_models(self) -> bool:
        """It is the method."""
        return True

    @property
    def weighs_norms(self) -> bool:
        """As the option says."""
        return self.options.norm

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Move the weight to the original's output, then round it."""
        gram, weight, options = problem.gram(), problem.weight, self.options
        if problem.drift is not None:
            shares = options.inputs, options.residual
            weight = matched_weight(weight, torch.as_tensor(gram), problem.drift, shares, options.damping)
        codes = gptq_round(weight, gram, problem.scheme.weight, options.damping)
        return QuantizedLinear(codes, problem.scheme.activation_bits)


def matched_weight(weight: Tensor, gram: Tensor, drift: Drift, shares: tuple[float, float], damping: float) -> Tensor:
    """The weight `[out, in]` float32 whose output is closest to the original's.

    Args:
        weight: `[out, in]` float32, the original's.
        gram: `[in, in]` float64, `X'^T X'` per token.
        drift: What is to be made up for.
        shares: Of the inputs' and of the residual stream's difference, 0 to 1 each.
        damping: Relative to the mean of the Gram matrix's diagonal; it holds the weight where it was.

    Example:
        >>> drift = Drift(torch.eye(2, dtype=torch.float64), None)  # the original reads twice as much
        >>> matched_weight(torch.ones(1, 2), torch.eye(2, dtype=torch.float64), drift, (1.0, 1.0), damping=0.0)
        tensor([[2., 2.]])
    """
    gain = shares[0] * (weight.double() @ drift.inputs.to(weight.device))
    if drift.residual is not None:
        gain = gain + shares[1] * drift.residual.to(weight.device)
    gram = gram.double()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        return weight
    damped = gram + torch.diag(damping * diagonal.mean() + dead.double() * diagonal.mean())
    moved: Tensor = weight.double() + torch.linalg.solve(damped, gain.T).T
    return moved.float()
