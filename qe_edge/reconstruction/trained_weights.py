"""Weights that gradients move through the rounding, of one layer or of a whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from qe_edge.numerics.grids import (
    MIN_RANGE,
    SCALE_DTYPE,
    QuantizedWeight,
    WeightGrid,
    quantize_weight,
    rounds_activations,
    split_groups,
)
from qe_edge.reconstruction.ranges import Ranges, round_through

MOMENTS = (0.9, 0.999)
MAGNITUDES = (0.1, 10.0)  # of a group, relative to the first


class TrainedWeight(nn.Module, ABC):
    """A weight `[out, in]` with parameters that gradients move.

    Example:
        >>> trained: TrainedWeight = FreeWeight(torch.tensor([[0.6, 7.0]]), WeightGrid(4))
        >>> trained.stored().codes
        tensor([[1, 7]], dtype=torch.int8)
    """

    @abstractmethod
    def decoded(self) -> Tensor:
        """The rounded weight `[out, in]` float32, differentiable in the parameters."""

    @abstractmethod
    def stored(self) -> QuantizedWeight:
        """The codes and scales of the weight as it is now."""


class FreeWeight(TrainedWeight):
    """All weights are trained; the range of every scale follows the largest of them.

    Args:
        weight: `[out, in]` float32.
        grid: Grid of the codes.

    Example:
        >>> trained = FreeWeight(torch.tensor([[0.6, 7.0]]), WeightGrid(4))
        >>> trained.decoded().sum().backward()
        >>> trained.decoded().tolist(), trained.weight.grad is not None
        ([[1.0, 7.0]], True)
    """

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(weight.clone())

    def decoded(self) -> Tensor:
        """Rounded in the range that the weights have now."""
        ranges = Ranges.of(self.weight, self.grid)
        return ranges.soft_decoded(torch.ones(*ranges.groups.shape[:2], 2))

    def stored(self) -> QuantizedWeight:
        """Rounded to nearest."""
        return quantize_weight(self.weight.detach(), self.grid)


class LowRankWeight(TrainedWeight):
    """A product of two factors is added before the rounding, and every scale group has a magnitude after it.

    `m s round((W + B A) / s)` with the first scales `s`, `B` zero and `m` one at the beginning.

    Args:
        weight: `[out, in]` float32.
        grid: Grid of the codes.
        rank: Of the factors.
        seed: Of the random numbers of `A`.

    Example:
        >>> trained = LowRankWeight(torch.tensor([[0.6, 7.0]]), WeightGrid(4), rank=1, seed=0)
        >>> trained.decoded().tolist(), sorted(name for name, _ in trained.named_parameters())
        ([[1.0, 7.0]], ['down', 'magnitude', 'up'])
    """

    def __init__(self, weight: Tensor, grid: WeightGrid, rank: int, seed: int) -> None:
        super().__init__()
        self.grid, self.weight = grid, weight
        first = quantize_weight(weight, grid)
        self.scales, self.zeros = first.scales, first.zeros
        drawn = torch.Generator().manual_seed(seed)
        spread = weight.std(correction=0) / max(rank, 1) ** 0.5
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], generator=drawn) * spread)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))
        self.magnitude = nn.Parameter(torch.ones_like(first.scales, dtype=torch.float32))

    def decoded(self) -> Tensor:
        """Rounded on the first grid, then scaled."""
        codes, point = self._codes()
        scales = self._scales().unsqueeze(-1)
        rounded: Tensor = (codes - point) * scales
        return rounded.reshape(self.weight.shape)

    def stored(self) -> QuantizedWeight:
        """The codes, and the first scales times their magnitudes."""
        with torch.no_grad():
            codes, _ = self._codes()
            scales = self._scales().to(SCALE_DTYPE)
        size = self.grid.resolve_group(self.weight.shape[1])
        return QuantizedWeight(
            codes.reshape(self.weight.shape).to(torch.int8), scales, self.zeros, self.grid.bits, size
        )

    def _scales(self) -> Tensor:
        scales: Tensor = self.scales.float() * self.magnitude.clamp(*MAGNITUDES)
        return scales

    def _codes(self) -> tuple[Tensor, Tensor | float]:
        groups = split_groups(self.weight + self.up @ self.down, self.grid)
        point = 0.0 if self.zeros is None else self.zeros.float().unsqueeze(-1)
        low, high = self.grid.limits
        codes: Tensor = (round_through(groups / self.scales.float().unsqueeze(-1)) + point).clamp(low, high)
        return codes, point


def soft_activation(x: Tensor, bits: int) -> Tensor:
    """Activations `[..., in]` rounded with one scale per token, and gradients as if they were not.

    Example:
        >>> soft_activation(torch.tensor([[127.0, 2.6]]), bits=8).tolist()
        [[127.0, 3.0]]
    """
    if not rounds_activations(bits):
        return x
    step = x.abs().amax(-1, keepdim=True).clamp_min(MIN_RANGE) / (2 ** (bits - 1) - 1)
    rounded: Tensor = round_through(x / step) * step
    return rounded


def train(parameters: Iterable[nn.Parameter], loss: Callable[[int], Tensor], steps: int, rate: float) -> None:
    """Adam with a rate that falls to zero in a line.

    Args:
        parameters: They move.
        loss: Of a step's number.
        steps: Number of steps.
        rate: The first step's.

    Example:
        >>> x = nn.Parameter(torch.tensor(1.0))
        >>> train([x], lambda _step: x.square(), steps=100, rate=0.05)
        >>> bool(x.abs() < 0.1)
        True
    """
    moved = list(parameters)
    optimizer = torch.optim.Adam(moved, lr=rate, betas=MOMENTS)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            torch.autograd.backward(loss(step), inputs=moved)
            optimizer.step()


def train_on_outputs(
    trained: TrainedWeight, weight: Tensor, tokens: Tensor, bits: int, steps: int, rate: float
) -> None:
    """Train one layer's weight on its outputs, through the rounding of activations of `bits`.

    Args:
        trained: Moves.
        weight: `[out, in]` float32, the original.
        tokens: `[n, in]` float32.
        bits: Of the activations.
        steps: Number of steps, each on all tokens.
        rate: Of the first step.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(8, 16), torch.randn(40, 4) @ torch.randn(4, 16)
        >>> trained = FreeWeight(weight, WeightGrid(3))
        >>> def error() -> float:
        ...     return float((tokens @ (trained.decoded().detach() - weight).T).norm())
        >>> before = error()
        >>> train_on_outputs(trained, weight, tokens, 0, steps=50, rate=0.01)
        >>> error() < 0.8 * before
        True
    """
    x, target = soft_activation(tokens, bits), tokens @ weight.T
    energy = target.square().mean().clamp_min(1e-30)

    def loss(_step: int) -> Tensor:
        return (functional.linear(x, trained.decoded()) - target).square().mean() / energy

    train(trained.parameters(), loss, steps, rate)
