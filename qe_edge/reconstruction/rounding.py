"""How the main branch's codes are chosen: nearest, in a searched range, with AWQ's channel scales, or by GPTQ.

All of them stay on the scheme's number grid, so a low-rank correction can follow any of them at the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qe_edge.errors import NumericalError
from qe_edge.grids import PER_CHANNEL, QuantizedWeight, WeightGrid, quantize_weight
from qe_edge.methods.scaling import storable_inverse

BLOCK = 128  # columns whose updates GPTQ applies to the rest at once
SMALLEST_SCALE = 1e-4  # of AWQ's search, before it is normalised
AWQ_STEPS = 20
CLIP_STEPS, CLIP_LEAST = 25, 0.5  # ranges tried: from the whole down to half of it


@dataclass(frozen=True)
class Rounding:
    """Choice of the codes.

    Attributes:
        kind: "nearest", "awq" (searched channel scales, then nearest) or "gptq".
        clip: Search the range of every scale for "nearest" and "gptq".
        damping: Of GPTQ's Hessian, relative to the mean of its diagonal.
    """

    kind: Literal["nearest", "awq", "gptq"] = "nearest"
    clip: bool = False
    damping: float = 0.01

    def __call__(
        self, weight: Tensor, grid: WeightGrid, gram: np.ndarray | None, abs_mean: np.ndarray
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """Codes of `weight` `[out, in]`, and float16 `1 / s` `[in]` where the input must be divided by `s`.

        Args:
            weight: Float32.
            grid: Grid of the codes.
            gram: `[in, in]`; only plain nearest rounding does without it.
            abs_mean: `[in]` mean |x|.

        Raises:
            NumericalError: If the Gram matrix is missing.
        """
        if self.kind == "nearest" and not self.clip:
            return quantize_weight(weight, grid), None
        if gram is None:
            raise NumericalError(f"Rounding '{self.kind}' needs the Gram matrix.", "Pass calibration tokens.")
        matrix = torch.from_numpy(gram)
        if self.kind == "awq":
            return search_scale(weight, abs_mean, matrix.float(), grid, AWQ_STEPS)
        if self.kind == "gptq":
            return gptq_round(weight, matrix, grid, self.damping, clip=self.clip), None
        return clipped_round(weight, grid, matrix.diagonal().float()), None


def clipped_round(weight: Tensor, grid: WeightGrid, importance: Tensor) -> QuantizedWeight:
    """Nearest codes in the range, between the whole and half of it, that loses least; one search per scale.

    Args:
        weight: `[out, in]` float32.
        grid: Grid of the codes.
        importance: `[in]` mean square of every input, which weighs the squared errors.
    """
    out_features, in_features = weight.shape
    group = grid.resolve_group(in_features)
    groups = weight.reshape(out_features, -1, in_features if group == PER_CHANNEL else group)
    weighing = importance.reshape(1, *groups.shape[1:])
    if grid.symmetric:
        high = groups.abs().amax(-1, keepdim=True)
        low = -high
    else:
        high, low = groups.amax(-1, keepdim=True).clamp_min(0), groups.amin(-1, keepdim=True).clamp_max(0)
    least = torch.full(groups.shape[:2], torch.inf)
    best = torch.ones_like(least)
    for share in torch.linspace(1.0, CLIP_LEAST, CLIP_STEPS):
        codes = quantize_weight(groups.clamp(low * share, high * share).reshape_as(weight), grid)
        loss = ((codes.decode().reshape_as(groups) - groups).square() * weighing).sum(-1)
        best = torch.where(loss < least, share, best)
        least = torch.minimum(loss, least)
    best = best.unsqueeze(-1)
    return quantize_weight(groups.clamp(low * best, high * best).reshape_as(weight), grid)


def search_scale(
    weight: Tensor, abs_mean: np.ndarray, gram: Tensor, grid: WeightGrid, steps: int
) -> tuple[QuantizedWeight, Tensor]:
    """AWQ (MLSys 2024): the channel scale, a power of `abs_mean`, that loses least.

    Args:
        weight: `[out, in]` float32.
        abs_mean: `[in]` mean |x|.
        gram: `[in, in]` float32.
        grid: Grid of the codes.
        steps: Number of powers tried.

    Returns:
        The codes of the scaled weight, and `1 / s` float16 `[in]`.
    """
    best = None
    for step in range(steps):
        scale = np.maximum(np.maximum(abs_mean, 1e-12) ** (step / steps), SMALLEST_SCALE)
        scale /= np.sqrt(scale.max() * scale.min())
        inverse = storable_inverse(scale)
        codes = quantize_weight(weight / inverse.float(), grid)
        error = weight - codes.decode() * inverse.float()
        loss = float(((error @ gram) * error).sum())
        if best is None or loss < best[0]:
            best = loss, codes, inverse
    if best is None:
        raise ValueError("steps must be positive")
    return best[1], best[2]


def gptq_round(
    weight: Tensor, gram: Tensor, grid: WeightGrid, damping: float, *, clip: bool = False
) -> QuantizedWeight:
    """GPTQ (ICLR 2023) without column reordering: the error of each column is spread over those to come.

    Args:
        weight: `[out, in]` float32.
        gram: `[in, in]` float64, `X^T X` up to a factor.
        grid: Grid; the scale of a group is found when the group is reached, from the weights as updated so far.
        damping: Relative to the mean of the Gram matrix's diagonal.
        clip: Search the range of every scale, as `clipped_round`.

    Raises:
        NumericalError: If the damped Gram matrix is still not positive definite.
    """
    hessian = gram.double().clone()
    importance = hessian.diagonal().float()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor = _inverse_factor(hessian).float()
    pivots = factor.diagonal().tolist()
    # inputs lie along the rows, so that a column of the weight is contiguous
    w = weight.float().T.contiguous()
    w[dead] = 0.0
    in_features = len(w)
    group = grid.resolve_group(in_features)
    width = in_features if group == PER_CHANNEL else group
    codes = torch.empty(w.shape, dtype=torch.int8)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    whole = replace(grid, group_size=PER_CHANNEL)
    scale = zero = torch.zeros(w.shape[1])
    for start in range(0, in_features, BLOCK):
        stop = min(start + BLOCK, in_features)
        errors = torch.zeros(stop - start, w.shape[1])
        for column in range(start, stop):
            if column % width == 0:
                # later columns of the group may lie beyond this block and still wait for its updates
                span = slice(column, column + width)
                part = w[span].clone()
                pending = factor[start:column, span].T @ errors[: column - start]
                part[stop - column :] -= pending[stop - column :]
                columns = part.T.contiguous()
                found = clipped_round(columns, whole, importance[span]) if clip else quantize_weight(columns, whole)
                scales.append(found.scales)
                scale = found.scales[:, 0].float()
                if found.zeros is not None:
                    zeros.append(found.zeros)
                    zero = found.zeros[:, 0].float()
            code = torch.round(w[column] / scale).add_(zero).clamp_(low, high)
            codes[column] = code
            error = (w[column] - (code - zero) * scale).div_(pivots[column])
            errors[column - start] = error
            w[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        w[stop:] -= factor[start:stop, stop:].T @ errors
    joined = torch.cat(zeros, dim=1) if zeros else None
    return QuantizedWeight(codes.T.contiguous(), torch.cat(scales, dim=1), joined, grid.bits, group)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise NumericalError("The Gram matrix is not positive definite.", "Raise the option 'damping'.")
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper
