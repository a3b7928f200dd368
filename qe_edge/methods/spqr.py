"""SpQR (ICLR 2024): GPTQ that keeps the few weights whose rounding costs most as sparse outliers in float16.

A weight is an outlier if its group saves more than a threshold without it, by the measure `e^2 / [H^-1]_jj` with `e`
the rounding errors of the group on the range that is left. Scales are fitted to the other weights. The wanted share of
the weights exceeds the threshold when all are rounded to nearest. The original tunes it by hand for about one percent.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import TorchParts, column_dtype, sparse_parts
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import (
    PER_CHANNEL,
    QuantizedWeight,
    WeightGrid,
    quantize_weight,
    round_on_grid,
    scales_of_range,
)
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.second_order import inverse_factor

BLOCK = 128  # columns whose updates are applied to the rest at once


class SpQROptions(MethodOptions):
    """Options of SpQR.

    Attributes:
        outliers: Share of the weights that are kept in float16, roughly; each takes 32 bits with its position.
        damping: Damping of the Hessian, relative to the mean of its diagonal.
    """

    outliers: float = Field(0.01, ge=0, le=0.2)
    damping: float = Field(0.01, gt=0, le=1)


class SpQR(Method[SpQROptions]):
    """Second-order rounding beside sparse outliers.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="spqr", scheme="w4a16", options={"outliers": 0.02})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.048  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    @property
    def torch_only(self) -> str:
        """The outliers."""
        return "its sparse outliers" if self.options.outliers else ""

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer with as many outliers as asked for."""
        plain = super().empty(out_features, in_features, scheme)
        count = round(self.options.outliers * out_features * in_features)
        if not count:
            return plain
        parts = TorchParts(
            outlier_starts=torch.empty(out_features + 1, dtype=torch.int32, device="meta"),
            outlier_columns=torch.empty(count, dtype=column_dtype(in_features), device="meta"),
            outlier_values=torch.empty(count, dtype=torch.float16, device="meta"),
        )
        return QuantizedLinear(plain.weight, plain.activation_bits, parts=parts)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Find outliers and round the rest, column by column."""
        energies = torch.from_numpy(problem.gram()).diagonal()
        dead = (energies == 0) & energies.any()  # inputs that are all zero say nothing of any channel
        factor = inverse_factor(problem.gram(), self.options.damping)
        kept = problem.weight.masked_fill(dead, 0.0)
        weight, outliers, values = spqr_round(kept, factor, problem.scheme.weight, self.options.outliers)
        parts = TorchParts(**sparse_parts(outliers, values)) if bool(outliers.any()) else None
        return QuantizedLinear(weight, problem.scheme.activation_bits, parts=parts)


def spqr_round(
    weight: Tensor, factor: Tensor, grid: WeightGrid, share: float
) -> tuple[QuantizedWeight, Tensor, Tensor]:
    """Codes, a mask of the outliers, and the values that outliers add to the decoded weight.

    Args:
        weight: `[out, in]` float32.
        factor: `[in, in]` upper Cholesky factor of the Hessian's inverse.
        grid: Grid of the codes; a group's scale is fitted when its turn comes.
        share: Share of the weights that are outliers.

    Returns:
        The codes; `[out, in]` bool; `[out, in]` float32, zero but at outliers.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(4, 64)
        >>> codes, outliers, values = spqr_round(weight, torch.eye(64).double(), WeightGrid(4), share=0.02)
        >>> exact = codes.decode() + values  # at the outliers, up to float16
        >>> bool(outliers.any()), bool(((exact - weight)[outliers]).abs().max() < 1e-2)
        (True, True)
    """
    w, saliency = weight.double(), factor.diagonal().square()
    size = grid.resolve_group(w.shape[1])
    width = w.shape[1] if size == PER_CHANNEL else size
    threshold = _threshold(weight, saliency, grid, share)
    outliers, codes = torch.zeros_like(w, dtype=torch.bool), torch.zeros_like(w, dtype=torch.int8)
    decoded, scales, zeros = torch.zeros_like(w), [], []
    for start in range(0, w.shape[1], width):
        group = slice(start, start + width)
        found = _savings(w[:, group].float(), saliency[group], grid) > threshold
        outliers[:, group] = found
        scale, zero = _range_without(w[:, group].float(), found, grid)
        scales.append(scale)
        zeros.append(zero)
        step = scale[:, 0].double()
        point = torch.zeros_like(step) if zero is None else zero[:, 0].double()
        for first in range(start, start + width, BLOCK):
            block = slice(first, min(first + BLOCK, start + width))
            errors = torch.zeros_like(w[:, block])
            for column in range(block.start, block.stop):
                code = (torch.round(w[:, column] / step) + point).clamp(*grid.limits)
                codes[:, column] = code
                decoded[:, column] = (code - point) * step
                # an outlier is kept as it is when its turn comes, up to float16
                kept = decoded[:, column] + (w[:, column] - decoded[:, column]).half().double()
                kept = torch.where(outliers[:, column], kept, decoded[:, column])
                error = (w[:, column] - kept) / factor[column, column]
                decoded[:, column], errors[:, column - first] = kept, error
                w[:, column : block.stop] -= torch.outer(error, factor[column, column : block.stop])
            w[:, block.stop :] -= errors @ factor[block, block.stop :]
    joined = [zero for zero in zeros if zero is not None]
    quantized = QuantizedWeight(codes, torch.cat(scales, 1), torch.cat(joined, 1) if joined else None, grid.bits, size)
    return quantized, outliers, torch.where(outliers, decoded.float() - quantized.decode(), 0.0)


def _threshold(weight: Tensor, saliency: Tensor, grid: WeightGrid, share: float) -> float:
    """The saving that a share of the weights exceeds."""
    count = round(share * weight.numel())
    if not count:
        return float("inf")
    size = grid.resolve_group(weight.shape[1])
    width = weight.shape[1] if size == PER_CHANNEL else size
    groups = (slice(start, start + width) for start in range(0, weight.shape[1], width))
    saving = torch.cat([_savings(weight[:, group], saliency[group], grid) for group in groups], 1).flatten()
    return float(saving.kthvalue(len(saving) - count).values)


def _savings(group: Tensor, saliency: Tensor, grid: WeightGrid) -> Tensor:
    """What a group `[out, width]` saves, in `e^2 / [H^-1]_jj`, when one of its weights is kept as it is.

    That is the weight's own error. Without the largest or the smallest weight the range is narrower too, which saves
    the others something.
    """
    whole = WeightGrid(grid.bits, PER_CHANNEL, grid.symmetric)
    cost = (quantize_weight(group, whole).decode() - group).double().square() / saliency
    saving, rows = cost.clone(), torch.arange(len(group))
    for column in (group.argmin(1), group.argmax(1)):
        left_out = torch.zeros_like(group, dtype=torch.bool)
        left_out[rows, column] = True
        narrower = round_on_grid(group, *_range_without(group, left_out, grid), whole).decode()
        rest = ((narrower - group).double().square() / saliency).masked_fill(left_out, 0.0)
        saving[rows, column] = cost.sum(1) - rest.sum(1)
    return saving


def _range_without(group: Tensor, outliers: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point `[out, 1]` of a group's weights without its outliers."""
    kept = group.masked_fill(outliers, 0.0)  # every range holds zero anyway
    return scales_of_range(kept.amin(1, keepdim=True), kept.amax(1, keepdim=True), grid)
