"""OmniQuant's learned weight clipping (ICLR 2024): the range of every scale is trained, codes follow by rounding.

`s = (g max W - b min W) / (2^bits - 1)` with `g, b = sigmoid(theta)`, theta starting at 4. Symmetric grids have one
such share, of the largest magnitude. Adam moves theta, and gradients pass the rounding.

Same as the original: parametrisation, start, optimizer. Different: the objective is the output error of the linear
under the input's Gram matrix, and so on all calibration tokens at every step; the original takes the block's output on
one sample at a time. So there are fewer and larger steps. Every output channel keeps its best ranges, or plain rounding
if that is no worse. The learned equivalent transformation (channel scales and shifts) is not built: SmoothQuant, AWQ
and MBQ are the methods with scales here.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import quantize_weight
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.ranges import Ranges, row_losses

START = 4.0  # sigmoid(4) = 0.98 of the whole range
MOMENTS = (0.9, 0.999)


class OmniQuantOptions(MethodOptions):
    """Options of OmniQuant.

    Attributes:
        steps: Steps of the optimizer.
        rate: Its learning rate; the original takes 0.01 or less and twenty passes over the data.
    """

    steps: int = Field(100, ge=1, le=10_000)
    rate: float = Field(0.05, gt=0, le=1)


class OmniQuant(Method[OmniQuantOptions]):
    """Learned clipping of the weights, layer by layer.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="omniquant", scheme="w4a16", options={"steps": 20})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.093  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Learn the ranges, then round."""
        gram = torch.from_numpy(problem.gram()).float()
        ranges = Ranges.of(problem.weight, problem.scheme.weight)
        shares = learn_shares(ranges, gram / gram.diagonal().mean().clamp_min(1e-30), self.options)
        clipped = ranges.clipped(shares)
        plain = quantize_weight(problem.weight, problem.scheme.weight)
        learned = quantize_weight(clipped, problem.scheme.weight)
        losses = [row_losses(codes.decode() - problem.weight, gram) for codes in (plain, learned)]
        better = (losses[1] < losses[0]).unsqueeze(1)
        # a row's ranges depend on that row alone, so rows can be mixed
        return QuantizedLinear(
            quantize_weight(torch.where(better, clipped, problem.weight), problem.scheme.weight),
            problem.scheme.activation_bits,
        )


def learn_shares(ranges: Ranges, gram: Tensor, options: OmniQuantOptions) -> Tensor:
    """Each row's best shares of the range, `[out, groups, 2]`: of the largest and of the smallest weight.

    Example:
        >>> from qe_edge.numerics.grids import WeightGrid
        >>> _ = torch.manual_seed(0)
        >>> ranges = Ranges.of(torch.randn(4, 64), WeightGrid(2))
        >>> shares = learn_shares(ranges, torch.eye(64), OmniQuantOptions(steps=50, rate=0.2))
        >>> tuple(shares.shape), bool(shares.min() < 0.9)  # with 2 bits it pays to cut the range
        ((4, 1, 2), True)
    """
    count = ranges.groups.shape[1]
    weight = ranges.groups.reshape(len(ranges.groups), -1)
    theta = torch.full((len(weight), count, 2), START, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=options.rate, betas=MOMENTS)
    energy = row_losses(weight, gram).clamp_min(1e-30)
    least = torch.full((len(weight),), torch.inf)
    best = theta.detach().clone()
    with torch.enable_grad():
        for _ in range(options.steps + 1):
            losses = row_losses(ranges.soft_decoded(theta.sigmoid()) - weight, gram) / energy
            better = losses.detach() < least
            least = torch.where(better, losses.detach(), least)
            best = torch.where(better[:, None, None], theta.detach(), best)
            optimizer.zero_grad()
            torch.autograd.backward(losses.sum())
            optimizer.step()
    return best.sigmoid()
