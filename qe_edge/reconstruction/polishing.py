"""Polishing of codes that were chosen one after the other: each code and each scale is chosen again, given all others.

The loss `tr(E H E^T)`, `E` the error of the weight, is quadratic in every code and in every scale. So the best value of
one of them has a closed form while all others are fixed, and the loss never rises. A scale stays if rounding to float16
would make it worse. GPTQ looks ahead only; polishing also looks back. For codes alone this is QuIP's greedy pass and
QuantEase.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qe_edge.numerics.grids import SCALE_DTYPE, QuantizedWeight, WeightGrid
from qe_edge.numerics.matrices import Matrix, to_tensor
from qe_edge.system.parallel import map_rows

BLOCK = 128  # columns whose changes are applied to the others at once
ROWS = 1024  # output channels that are polished at a time


def polished(
    codes: QuantizedWeight, weight: Tensor, gram: Matrix, grid: WeightGrid, damping: float, rounds: int
) -> QuantizedWeight:
    """Codes and scales that lose no more under the damped Gram matrix; zero points stay.

    Args:
        codes: Codes and scales to begin with.
        weight: `[out, in]` float32, the weight before rounding.
        gram: `[in, in]`, `X^T X` up to a factor.
        grid: Grid of the codes.
        damping: Relative to the mean of the Gram matrix's diagonal.
        rounds: Times that all scales and then all codes are chosen again.

    Example:
        >>> from qe_edge.numerics.grids import quantize_weight
        >>> weight, gram = torch.linspace(0.1, 1, 16).reshape(1, 16), torch.ones(16, 16)  # inputs that are all the same
        >>> codes = quantize_weight(weight, WeightGrid(3))
        >>> better = polished(codes, weight, gram, WeightGrid(3), 0.01, 2)
        >>> [round(abs(float((one.decode() - weight).sum())), 1) for one in (codes, better)]
        [0.1, 0.0]
    """
    hessian = to_tensor(gram).float()
    diagonal = hessian.diagonal()
    added = damping * diagonal.mean() + (diagonal == 0).float()  # an input that is always zero decides nothing
    hessian = hessian + torch.diag(added)
    kept = weight.masked_fill((diagonal == 0) & diagonal.any(), 0.0)  # as GPTQ has it
    parts = map_rows(lambda rows: _rows(codes, kept, hessian, grid, rounds, rows), len(weight), ROWS)
    found, scales = zip(*parts, strict=True)
    return replace(codes, codes=torch.cat(found), scales=torch.cat(scales))


def _rows(
    codes: QuantizedWeight, weight: Tensor, hessian: Tensor, grid: WeightGrid, rounds: int, rows: slice
) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales of some output channels."""
    w, scales = weight[rows], codes.scales[rows]
    width = w.shape[1] // scales.shape[1]
    point = None if codes.zeros is None else codes.zeros[rows].float().repeat_interleave(width, 1)
    steps = codes.codes[rows].float() if point is None else codes.codes[rows] - point
    low, high = (torch.tensor(float(limit), device=w.device) for limit in grid.limits)
    low, high = (limit.expand(w.shape) if point is None else limit - point for limit in (low, high))
    for _ in range(rounds):
        scales = fitted_scales(w, steps, scales, hessian)
        steps = chosen_steps(w, steps, scales.float().repeat_interleave(width, 1), hessian, (low, high))
    return (steps if point is None else steps + point).to(torch.int8), scales


def fitted_scales(weight: Tensor, steps: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """Scales float16 `[out, groups]`, each the best for the others; a scale that would not be positive stays.

    Args:
        weight: `[out, in]` float32.
        steps: `[out, in]` codes minus zero points.
        scales: Scales to begin with.
        hessian: `[in, in]` float32.

    Example:
        >>> weight, steps = torch.tensor([[0.6, 1.2]]), torch.tensor([[1.0, 2.0]])
        >>> scales = torch.tensor([[0.5]], dtype=torch.float16)
        >>> fitted_scales(weight, steps, scales, torch.eye(2))
        tensor([[0.6001]], dtype=torch.float16)
    """
    width, fitted = weight.shape[1] // scales.shape[1], scales.float().clone()
    error = weight - steps * fitted.repeat_interleave(width, 1)
    for group in range(scales.shape[1]):
        span = slice(group * width, (group + 1) * width)
        own = steps[:, span]
        gain = ((error @ hessian[:, span]) * own).sum(1)
        energy = ((own @ hessian[span, span]) * own).sum(1)
        wanted = (fitted[:, group] + gain / energy.clamp_min(1e-30)).to(SCALE_DTYPE).float()
        change = wanted - fitted[:, group]
        better = (wanted > 0) & wanted.isfinite() & (change * (change * energy - 2 * gain) < 0)
        change = torch.where(better, change, 0.0)
        fitted[:, group] += change
        error[:, span] -= change.unsqueeze(1) * own
    return fitted.to(SCALE_DTYPE)


def chosen_steps(
    weight: Tensor, steps: Tensor, scale: Tensor, hessian: Tensor, limits: tuple[Tensor, Tensor]
) -> Tensor:
    """Codes minus zero points `[out, in]`, each chosen again in the order of the columns, given all others.

    Args:
        weight: `[out, in]` float32.
        steps: Codes minus zero points to begin with.
        scale: `[out, in]`, the scale of every weight.
        hessian: `[in, in]` float32.
        limits: Smallest and largest value, each `[out, in]`.

    Example:
        >>> weight, steps = torch.tensor([[0.6, 1.2]]), torch.tensor([[3.0, 0.0]])
        >>> limits = torch.full((1, 2), -8.0), torch.full((1, 2), 7.0)
        >>> chosen_steps(weight, steps, torch.full((1, 2), 0.5), torch.eye(2), limits)
        tensor([[1., 2.]])
    """
    # inputs lie along the rows, so that a column of the weight is contiguous
    pull = (hessian @ (weight - steps * scale).T).contiguous()
    chosen, scale = steps.T.contiguous(), scale.T.contiguous()
    low, high = (limit.T.contiguous() for limit in limits)
    inverse = 1.0 / (scale * hessian.diagonal().unsqueeze(1))
    for start in range(0, len(chosen), BLOCK):
        stop = min(start + BLOCK, len(chosen))
        moved = torch.empty_like(chosen[start:stop])
        for column in range(start, stop):
            wanted = torch.round(pull[column] * inverse[column]).add_(chosen[column])
            wanted = torch.minimum(torch.maximum(wanted, low[column]), high[column])
            torch.mul(wanted - chosen[column], scale[column], out=moved[column - start])
            chosen[column] = wanted
            pull[start:stop].addr_(hessian[start:stop, column], moved[column - start], alpha=-1)
        pull[:start].addmm_(hessian[:start, start:stop], moved, alpha=-1)
        pull[stop:].addmm_(hessian[stop:, start:stop], moved, alpha=-1)
    return chosen.T.contiguous()
