"""LSQ (ICLR 2020): weights and the step sizes of their grid are trained together, straight through the rounding.

`W^ = s round(clip(W / s, -Q_N, Q_P))`. The gradient of `s` is `round(W / s) - W / s` inside the range and the end of
the range outside, times `1 / sqrt(n Q_P)` for the n weights of a step size. The gradient of `W` is 1 inside the range.

Same as the original: forward, gradients, their scale, and the first step size `2 mean|W| / sqrt(Q_P)` on symmetric
grids. Different: the loss is the output error of the linear under the input's Gram matrix, not the loss of a task with
labels, and Adam moves the weights. Activations have the scheme's dynamic scales, not learned ones. Zero points do not
change. Every output channel keeps its best step, or plain rounding if that is no worse.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import (
    MIN_RANGE,
    SCALE_DTYPE,
    QuantizedWeight,
    WeightGrid,
    quantize_weight,
    round_on_grid,
    scales_of_range,
    split_groups,
)
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.ranges import round_through, row_losses

MOMENTS = (0.9, 0.999)
BOUNDS = (0.1, 10.0)  # of a step size, relative to the first


class LSQOptions(MethodOptions):
    """Options of LSQ.

    Attributes:
        steps: Steps of the optimizer.
        rate: Learning rate. Weights move in units of the first step sizes, and step sizes relative to the first.
    """

    steps: int = Field(200, ge=1, le=10_000)
    rate: float = Field(0.02, gt=0, le=1)


class LSQ(Method[LSQOptions]):
    """Learned step sizes, layer by layer.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="lsq", scheme="w4a16", options={"steps": 50})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.072  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Train weights and step sizes, then round."""
        gram = torch.from_numpy(problem.gram()).float()
        gram /= gram.diagonal().mean().clamp_min(1e-30)
        steps, zeros = first_steps(problem.weight, problem.scheme.weight)
        trained = learn_steps(problem.weight, steps, zeros, problem.scheme.weight, gram, self.options)
        learned = stored(*trained, zeros, problem.scheme.weight)
        plain = quantize_weight(problem.weight, problem.scheme.weight)  # with the same zero points
        losses = [row_losses(codes.decode() - problem.weight, gram) for codes in (learned, plain)]
        better = (losses[0] < losses[1]).unsqueeze(1)
        codes = torch.where(better, learned.codes, plain.codes)
        weight = replace(learned, codes=codes, scales=torch.where(better, learned.scales, plain.scales))
        return QuantizedLinear(weight, problem.scheme.activation_bits)


def first_steps(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor | None]:
    """Step sizes `[out, groups]` float32 to begin with, and zero points.

    Example:
        >>> steps, zeros = first_steps(torch.tensor([[0.5, -0.5, 1.0, -1.0]]), WeightGrid(4))
        >>> round(float(steps), 3), zeros  # 2 mean|W| / sqrt(7)
        (0.567, None)
    """
    groups = split_groups(weight.float(), grid)
    if grid.symmetric:
        mean = 2 * groups.abs().mean(-1) / grid.limits[1] ** 0.5
        return mean.clamp_min(MIN_RANGE / grid.limits[1]), None
    scales, zeros = scales_of_range(groups.amin(-1), groups.amax(-1), grid)
    return scales.float(), zeros


def decoded(weight: Tensor, steps: Tensor, zeros: Tensor | None, grid: WeightGrid) -> Tensor:
    """The rounded weight `[out, in]`, differentiable in the weight and the step sizes `[out, groups]`.

    Example:
        >>> weight, steps = torch.tensor([[0.6, 1.2]]), torch.tensor([[0.5]], requires_grad=True)
        >>> rounded = decoded(weight, steps, None, WeightGrid(4))
        >>> rounded.sum().backward()
        >>> rounded.tolist(), bool(steps.grad != 0)
        ([[0.5, 1.0]], True)
    """
    low, high = grid.limits
    groups = split_groups(weight, grid)
    share = (groups.shape[-1] * high) ** -0.5
    # the value is rounded to float16, as it is stored; the gradient is `share` times as large
    scale = (steps * share + (steps.to(SCALE_DTYPE).float() - steps * share).detach()).unsqueeze(-1)
    point = 0.0 if zeros is None else zeros.float().unsqueeze(-1)
    codes = round_through((groups / scale).clamp(low - point, high - point))
    rounded: Tensor = codes * scale
    return rounded.reshape(weight.shape)


def learn_steps(
    weight: Tensor, steps: Tensor, zeros: Tensor | None, grid: WeightGrid, gram: Tensor, options: LSQOptions
) -> tuple[Tensor, Tensor]:
    """The weight `[out, in]` and step sizes `[out, groups]` of each row's best iterate.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight, grid = torch.randn(4, 32), WeightGrid(3)
        >>> steps, zeros = first_steps(weight, grid)
        >>> trained, size = learn_steps(weight, steps, zeros, grid, torch.eye(32), LSQOptions(steps=20))
        >>> tuple(trained.shape), tuple(size.shape)
        ((4, 32), (4, 1))
    """
    unit = steps.unsqueeze(-1).expand_as(split_groups(weight, grid)).reshape(weight.shape)
    moved, grown = torch.zeros_like(weight, requires_grad=True), torch.ones_like(steps, requires_grad=True)
    optimizer = torch.optim.Adam([moved, grown], lr=options.rate, betas=MOMENTS)
    energy = row_losses(weight, gram).clamp_min(1e-30)
    least = torch.full((len(weight),), torch.inf)
    best = weight.clone(), steps.clone()
    with torch.enable_grad():
        for _ in range(options.steps + 1):
            trained, size = weight + moved * unit, grown * steps
            losses = row_losses(decoded(trained, size, zeros, grid) - weight, gram) / energy
            better = losses.detach() < least
            least = torch.where(better, losses.detach(), least)
            for kept, now in zip(best, (trained, size), strict=True):
                kept[better] = now.detach()[better]
            optimizer.zero_grad()
            torch.autograd.backward(losses.sum())
            optimizer.step()
            grown.data.clamp_(*BOUNDS)
    return best


def stored(weight: Tensor, steps: Tensor, zeros: Tensor | None, grid: WeightGrid) -> QuantizedWeight:
    """The codes of a trained weight on float16 step sizes.

    Example:
        >>> stored(torch.tensor([[0.6, 1.2]]), torch.tensor([[0.5]]), None, WeightGrid(4)).codes
        tensor([[1, 2]], dtype=torch.int8)
    """
    return round_on_grid(weight, steps.to(SCALE_DTYPE), zeros, grid)
