"""Ranges of a weight's scales that gradients can move, and rounding that lets gradients through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qe_edge.numerics.grids import MIN_RANGE, PER_CHANNEL, WeightGrid


@dataclass(frozen=True)
class Ranges:
    """Weights by scale group, and the whole range of each.

    Attributes:
        groups: `[out, groups, width]` float32.
        high: `[out, groups, 1]` largest weight, at least 0; the largest magnitude on a symmetric grid.
        low: `[out, groups, 1]` smallest weight, at most 0; minus `high` on a symmetric grid.
        grid: Grid of the codes.

    Example:
        >>> ranges = Ranges.of(torch.tensor([[0.7, -0.2, 0.4]]), WeightGrid(4))
        >>> whole, half = torch.ones(1, 1, 2), torch.full((1, 1, 2), 0.5)
        >>> ranges.soft_decoded(whole), ranges.clipped(half)
        (tensor([[ 0.7000, -0.2000,  0.4000]]), tensor([[ 0.3500, -0.2000,  0.3500]]))
    """

    groups: Tensor
    high: Tensor
    low: Tensor
    grid: WeightGrid

    @classmethod
    def of(cls, weight: Tensor, grid: WeightGrid) -> Ranges:
        """Groups of `weight` `[out, in]`."""
        size = grid.resolve_group(weight.shape[1])
        groups = weight.reshape(len(weight), -1, weight.shape[1] if size == PER_CHANNEL else size)
        if grid.symmetric:
            high = groups.abs().amax(-1, keepdim=True)
            return cls(groups, high, -high, grid)
        return cls(groups, groups.amax(-1, keepdim=True).clamp_min(0), groups.amin(-1, keepdim=True).clamp_max(0), grid)

    def clipped(self, shares: Tensor) -> Tensor:
        """The weight `[out, in]` inside the learned shares `[out, groups, 2]` of its ranges."""
        inside = self.groups.clamp(self.low * shares[..., 1:], self.high * shares[..., :1])
        return inside.reshape(len(self.groups), -1)

    def soft_decoded(self, shares: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        """Rounded weight `[out, in]` for these shares, differentiable in them and in an offset of the codes.

        Args:
            shares: `[out, groups, 2]`, of the largest and the smallest weight.
            offset: `[out, groups, width]`, added before the rounding, in steps of the scale.
        """
        bits = self.grid.bits
        if self.grid.symmetric:
            top = 2 ** (bits - 1) - 1
            scale = (self.high * shares[..., :1]).clamp_min(MIN_RANGE) / top
            codes = round_through(self.groups / scale + offset).clamp(-top - 1, top)
            decoded: Tensor = codes * scale
            return decoded.reshape(len(self.groups), -1)
        top = 2**bits - 1
        low = self.low * shares[..., 1:]
        scale = (self.high * shares[..., :1] - low).clamp_min(MIN_RANGE) / top
        zero = torch.round(-low / scale).detach().clamp(0, top)
        codes = (round_through(self.groups / scale + offset) + zero).clamp(0, top)
        decoded = (codes - zero) * scale
        return decoded.reshape(len(self.groups), -1)


def row_losses(error: Tensor, gram: Tensor) -> Tensor:
    """`diag(E G E^T)` `[out]`: the square error of every output per token.

    Example:
        >>> row_losses(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), gram=torch.eye(2))
        tensor([1., 4.])
    """
    return ((error @ gram) * error).sum(1)


def round_through(x: Tensor) -> Tensor:
    """Rounding whose gradient is that of the identity.

    Example:
        >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> rounded = round_through(x)
        >>> rounded.sum().backward()
        >>> rounded.tolist(), x.grad.tolist()
        ([0.0, 2.0], [1.0, 1.0])
    """
    return x + (torch.round(x) - x).detach()
