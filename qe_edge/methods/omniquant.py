"""OmniQuant (ICLR 2024): the range of every weight scale is trained, and channel scales too if asked for.

Learned weight clipping: `s = (g max W - b min W) / (2^bits - 1)` with `g, b = sigmoid(theta)`, theta starting at 4.
Symmetric grids have one such share, of the largest magnitude. Adam moves theta, and gradients pass the rounding.

Same as the original: parametrisation, start, optimizer. Different: the objective is the output error of the linear
under the input's Gram matrix, and so on all calibration tokens at every step; the original takes the block's output on
one sample at a time. So there are fewer and larger steps. Every output channel keeps its best ranges, or plain rounding
if that is no worse.

Learned equivalent transformation (`transform`): one scale per input channel, which begins as SmoothQuant's and is
trained by Adam on the square error of sampled outputs, through both quantizers. Clipping follows on the scaled weight;
the original trains both at once. The original's shifts of channels are not built: the operator adds nothing to its
input. Its scale between queries and keys changes nothing that this operator rounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.methods.smoothquant import smoothing_scale
from qe_edge.numerics.grids import QuantizedWeight, quantize_weight
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.learned_scales import ScaleLearning, learn_inverse
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.ranges import Ranges, row_losses

START = 4.0  # sigmoid(4) = 0.98 of the whole range
MOMENTS = (0.9, 0.999)


class OmniQuantOptions(MethodOptions):
    """Options of OmniQuant.

    Attributes:
        steps: Steps of the optimizer.
        rate: Its learning rate; the original takes 0.01 or less and twenty passes over the data.
        transform: Learn channel scales too. Layers that read the same input share one.
        scale_steps: Steps by which they are learned.
        scale_rate: Their learning rate.
        tokens: Size of the token sample that they are learned on.
    """

    steps: int = Field(100, ge=1, le=10_000)
    rate: float = Field(0.05, gt=0, le=1)
    transform: bool = False
    scale_steps: int = Field(64, ge=0, le=10_000)
    scale_rate: float = Field(0.01, gt=0, le=1)
    tokens: int = Field(2048, ge=1, le=1 << 20)


class OmniQuant(Method[OmniQuantOptions]):
    """Learned clipping of the weights, layer by layer; the preset "paper" learns channel scales too.

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

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "paper": {"transform": True}}

    @property
    def stack_siblings(self) -> bool:
        """One channel scale for all consumers of an input."""
        return self.options.transform

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix, and a token sample for channel scales."""
        return StatisticsRequest(gram=True, tokens=self.options.tokens if self.options.transform else 0)

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer with a channel scale, if one is learned."""
        plain = super().empty(out_features, in_features, scheme)
        scale = torch.empty(in_features, dtype=torch.float16, device="meta") if self.options.transform else None
        return replace(plain, inv_omega=scale)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Learn the scale, then the ranges, then round."""
        gram = torch.from_numpy(problem.gram())
        if not self.options.transform:
            return QuantizedLinear(self._clipped(problem, problem.weight, gram), problem.scheme.activation_bits)
        inverse = self._transformation(problem)
        scaled = gram * torch.outer(inverse.double(), inverse.double())
        codes = self._clipped(problem, problem.weight / inverse.float(), scaled)
        return QuantizedLinear(codes, problem.scheme.activation_bits, inverse)

    def _transformation(self, problem: LinearProblem) -> Tensor:
        """The factor `[in]` float16 on the input, all ones where no scale helps."""
        measured, options = problem.measured(), self.options
        largest = problem.weight.abs().amax(0).double().numpy()
        starts = [np.ones(len(largest)), smoothing_scale(measured.abs_max, largest, 0.5)]
        learning = ScaleLearning(options.scale_steps, options.scale_rate, power=2, seed=problem.seed)
        return learn_inverse(problem.weight, torch.from_numpy(measured.tokens), problem.scheme, starts, learning)

    def _clipped(self, problem: LinearProblem, weight: Tensor, moments: Tensor) -> QuantizedWeight:
        """The codes of a weight inside learned ranges, for inputs with these second moments `[in, in]`."""
        gram = moments.float()
        ranges = Ranges.of(weight, problem.scheme.weight)
        shares = learn_shares(ranges, gram / gram.diagonal().mean().clamp_min(1e-30), self.options)
        clipped = ranges.clipped(shares)
        plain = quantize_weight(weight, problem.scheme.weight)
        learned = quantize_weight(clipped, problem.scheme.weight)
        losses = [row_losses(codes.decode() - weight, gram) for codes in (plain, learned)]
        better = (losses[1] < losses[0]).unsqueeze(1)
        # a row's ranges depend on that row alone, so rows can be mixed
        return quantize_weight(torch.where(better, clipped, weight), problem.scheme.weight)


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
