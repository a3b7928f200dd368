"""The range of a weight's scales that loses least, and the nearest codes in it."""

from __future__ import annotations

import torch
from torch import Tensor

from qe_edge.numerics.grids import QuantizedWeight, WeightGrid, round_on_grid, scales_of_range, split_groups
from qe_edge.system.device import CPU
from qe_edge.system.parallel import map_rows

CACHED = 1 << 17  # weights whose range is searched at a time: their float32 values stay in a core's cache
CLIP_STEPS, CLIP_LEAST = 9, 0.5  # ranges tried: from the whole down to half of it
CLIP_FINER = (-2 / 48, -1 / 48, 1 / 48, 2 / 48)  # and those around the best: 3e-4 above trying all at this distance


def clipped_round(weight: Tensor, grid: WeightGrid, importance: Tensor) -> QuantizedWeight:
    """Nearest codes in the range, between the whole and half of it, that loses least; one search per scale.

    Args:
        weight: `[out, in]` float32.
        grid: Grid of the codes.
        importance: `[in]` mean square of every input, which weighs the squared errors.

    Example:
        >>> from qe_edge.numerics.grids import quantize_weight
        >>> weight = torch.tensor([[0.2, -0.3, 0.25, -0.2, 0.15, 0.5]])
        >>> importance = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e-4])  # the largest weight hardly counts
        >>> clipped_round(weight, WeightGrid(2), importance).decode().round(decimals=2)
        tensor([[ 0.2500, -0.2500,  0.2500, -0.2500,  0.2500,  0.2500]])
        >>> quantize_weight(weight, WeightGrid(2)).decode().round(decimals=2)
        tensor([[ 0.0000, -0.5000,  0.0000,  0.0000,  0.0000,  0.5000]])
    """
    scales, zeros = search_range(weight, grid, importance)
    return round_on_grid(weight, scales, zeros, grid)


def search_range(weight: Tensor, grid: WeightGrid, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points `[out, groups]` of the ranges that lose least. `clipped_round` describes the arguments.

    Example:
        >>> scales, zeros = search_range(torch.tensor([[0.7, -0.1, 0.2]]), WeightGrid(4), torch.ones(3))
        >>> scales.shape, zeros
        (torch.Size([1, 1]), None)
    """
    groups = split_groups(weight, grid)
    weighing = importance.reshape(groups.shape[1:])
    piece = max(1, CACHED // weight.shape[1] if weight.device == CPU else len(weight))
    found = map_rows(lambda rows: _search_rows(groups[rows], grid, weighing), len(weight), piece)
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), None if grid.symmetric else torch.cat(zeros)


def _search_rows(groups: Tensor, grid: WeightGrid, weighing: Tensor) -> tuple[Tensor, Tensor | None]:
    """`search_range` for few groups `[rows, groups, width]`; their errors are weighed by `[groups, width]`."""
    smallest, largest = groups.amin(-1), groups.amax(-1)
    if not grid.symmetric:  # a range that is cut down keeps its zero
        smallest, largest = smallest.clamp_max(0.0), largest.clamp_min(0.0)
    low, high = grid.limits
    least = torch.full_like(smallest, torch.inf)
    best = torch.ones_like(least)
    errors = torch.empty_like(groups)

    def try_share(share: Tensor) -> None:
        nonlocal best, least
        scales, zeros = scales_of_range(smallest * share, largest * share, grid)
        scale = scales.float().unsqueeze(-1)
        torch.mul(groups, scale.reciprocal(), out=errors).round_()
        if zeros is None:
            errors.clamp_(low, high)
        else:
            point = zeros.float().unsqueeze(-1)
            errors.clamp_(low - point, high - point)
        errors.mul_(scale).sub_(groups).square_()
        loss = torch.einsum("rgw,gw->rg", errors, weighing)
        best = torch.where(loss < least, share, best)
        least = torch.minimum(loss, least)

    for share in torch.linspace(1.0, CLIP_LEAST, CLIP_STEPS):
        try_share(share)
    centre = best
    for step in CLIP_FINER:
        try_share((centre + step).clamp(CLIP_LEAST, 1.0))
    return scales_of_range(smallest * best, largest * best, grid)
