"""Sign-gradient rounding (AutoRound, EMNLP 2024): rounding offsets and ranges move by the signs of their gradients.

`W^ = s clip(round(W / s + V) + z)` with `V` in [-1/2, 1/2] and shares of the largest and the smallest weight up to 1.
Every step moves each of them by the same amount, which falls linearly to zero.

Same as the original: parameters, bounds, signs, steps and their size. Different: the objective is the output error of
the linear under the input's Gram matrix, and so on all calibration tokens at once; the original takes the block's
output on a few samples. Every output channel keeps its best step, or plain rounding if that is no worse.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import QuantizedWeight, WeightGrid, round_on_grid, scales_of_range
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.ranges import Ranges, row_losses

SMALLEST_SHARE = 0.1


class AutoRoundOptions(MethodOptions):
    """Options of sign-gradient rounding.

    Attributes:
        steps: Steps of the optimizer.
        rate: Size of the first step, for offsets (in steps of the grid) and for shares; 0 takes 1 / steps.
    """

    steps: int = Field(200, ge=1, le=10_000)
    rate: float = Field(0.0, ge=0, le=0.5)


class AutoRound(Method[AutoRoundOptions]):
    """Learned rounding and ranges by signed gradient descent.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="autoround", scheme="w4a16", options={"steps": 50})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.079  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Learn offsets and ranges, then round."""
        gram = torch.from_numpy(problem.gram()).float()
        gram /= gram.diagonal().mean().clamp_min(1e-30)
        ranges = Ranges.of(problem.weight, problem.scheme.weight)
        shares, offset = learn_rounding(ranges, gram, self.options.steps, self.options.rate or 1 / self.options.steps)
        plain = torch.ones_like(shares), torch.zeros_like(offset)
        found = [rounded(ranges, *choice) for choice in ((shares, offset), plain)]
        learned, nearest = (row_losses(codes.decode() - problem.weight, gram) for codes in found)
        better = (learned < nearest)[:, None, None]
        # a row's codes depend on that row alone, so rows can be mixed
        weight = rounded(ranges, torch.where(better, shares, plain[0]), torch.where(better, offset, plain[1]))
        return QuantizedLinear(weight, problem.scheme.activation_bits)


def learn_rounding(ranges: Ranges, gram: Tensor, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """Shares `[out, groups, 2]` and offsets `[out, groups, width]` of the step that lost least, by row.

    Args:
        ranges: The weight.
        gram: `[in, in]` float32.
        steps: Number of steps.
        rate: Size of the first one.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> ranges = Ranges.of(torch.randn(4, 32), WeightGrid(3))
        >>> shares, offset = learn_rounding(ranges, torch.eye(32), steps=20, rate=0.05)
        >>> tuple(shares.shape), tuple(offset.shape), bool(offset.abs().max() <= 0.5)
        ((4, 1, 2), (4, 1, 32), True)
    """
    out, groups, _ = ranges.groups.shape
    weight = ranges.groups.reshape(out, -1)
    shares, offset = torch.ones(out, groups, 2, requires_grad=True), torch.zeros_like(ranges.groups, requires_grad=True)
    least = torch.full((out,), torch.inf)
    best = shares.detach().clone(), offset.detach().clone()
    for step in range(steps + 1):
        with torch.enable_grad():
            losses = row_losses(ranges.soft_decoded(shares, offset) - weight, gram)
            by_shares, by_offset = torch.autograd.grad(losses.sum(), (shares, offset))
        better = losses.detach() < least
        least = torch.where(better, losses.detach(), least)
        for kept, now in zip(best, (shares, offset), strict=True):
            kept[better] = now.detach()[better]
        size = rate * (1 - step / steps)
        with torch.no_grad():
            shares.sub_(size * by_shares.sign()).clamp_(SMALLEST_SHARE, 1)
            offset.sub_(size * by_offset.sign()).clamp_(-0.5, 0.5)
    return best


def rounded(ranges: Ranges, shares: Tensor, offset: Tensor) -> QuantizedWeight:
    """The codes for shares of the ranges and offsets, on float16 scales.

    Example:
        >>> ranges = Ranges.of(torch.tensor([[0.7, 0.24]]), WeightGrid(4))
        >>> whole, none, up = torch.ones(1, 1, 2), torch.zeros(1, 1, 2), torch.tensor([[[0.0, 0.3]]])
        >>> rounded(ranges, whole, none).codes, rounded(ranges, whole, up).codes
        (tensor([[7, 2]], dtype=torch.int8), tensor([[7, 3]], dtype=torch.int8))
    """
    smallest, largest = (ranges.low * shares[..., 1:])[..., 0], (ranges.high * shares[..., :1])[..., 0]
    grid: WeightGrid = ranges.grid
    if grid.symmetric:
        smallest = -largest
    scales, zeros = scales_of_range(smallest, largest, grid)
    moved = ranges.groups + offset * scales.float().unsqueeze(-1)
    return round_on_grid(moved.reshape(len(moved), -1), scales, zeros, grid)
