"""GPTQ (ICLR 2023): columns are rounded one after the other, and each error is spread over the columns to come.

Groups and scales are those of the scheme. The method's own flow is sequential (`flow: sequential` in the recipe).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.errors import NumericalError
from qe_edge.grids import PER_CHANNEL, QuantizedWeight, WeightGrid, quantize_weight
from qe_edge.linear import QuantizedLinear
from qe_edge.methods.base import LinearProblem, Method, MethodOptions

BLOCK = 128  # columns whose updates are applied to the rest at once


class GPTQOptions(MethodOptions):
    """Options of GPTQ.

    Attributes:
        damping: Added to the Hessian's diagonal, relative to its mean.
    """

    damping: float = Field(0.01, gt=0, le=1)


class GPTQ(Method):
    """Second-order rounding with the input's Gram matrix as Hessian."""

    Options: ClassVar[type[MethodOptions]] = GPTQOptions
    options: GPTQOptions

    def request(self, out_features: int, in_features: int) -> StatisticsRequest | None:  # noqa: ARG002
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round the weight of `problem` column by column."""
        weight = gptq_round(
            problem.weight, torch.from_numpy(problem.gram()), problem.scheme.weight, self.options.damping
        )
        return QuantizedLinear(weight, problem.scheme.activation_bits)


def gptq_round(weight: Tensor, gram: Tensor, grid: WeightGrid, damping: float) -> QuantizedWeight:
    """GPTQ without column reordering.

    Args:
        weight: `[out, in]` float32.
        gram: `[in, in]` float64, `X^T X` up to a factor.
        grid: Grid; the scale of a group is found when the group is reached, from the weights as updated so far.
        damping: Relative to the mean of the Gram matrix's diagonal.

    Raises:
        NumericalError: If the damped Gram matrix is still not positive definite.
    """
    w = weight.double().clone()
    hessian = gram.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    factor = _inverse_factor(hessian)
    in_features = w.shape[1]
    group = grid.resolve_group(in_features)
    width = in_features if group == PER_CHANNEL else group
    codes = torch.empty(w.shape, dtype=torch.int8)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    low, high = -(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1
    for start in range(0, in_features, BLOCK):
        stop = min(start + BLOCK, in_features)
        errors = torch.zeros(w.shape[0], stop - start, dtype=torch.float64)
        for column in range(start, stop):
            if column % width == 0:
                # later columns of the group may lie beyond this block and still wait for its updates
                pending = errors[:, : column - start] @ factor[start:column, column : column + width]
                part = w[:, column : column + width].clone()
                part[:, stop - column :] -= pending[:, stop - column :]
                found = quantize_weight(part.float(), replace(grid, group_size=PER_CHANNEL))
                scales.append(found.scales)
                if found.zeros is not None:
                    zeros.append(found.zeros)
            scale = scales[-1][:, 0].double()
            zero = zeros[-1][:, 0].double() if zeros else torch.zeros_like(scale)
            code = (torch.round(w[:, column] / scale) + zero).clamp(low, high)
            codes[:, column] = code.to(torch.int8)
            error = (w[:, column] - (code - zero) * scale) / factor[column, column]
            errors[:, column - start] = error
            w[:, column + 1 : stop] -= error[:, None] * factor[column, column + 1 : stop]
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    joined = torch.cat(zeros, dim=1) if zeros else None
    return QuantizedWeight(codes, torch.cat(scales, dim=1), joined, grid.bits, group)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise NumericalError("The Gram matrix is not positive definite.", "Raise the option 'damping'.")
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper
