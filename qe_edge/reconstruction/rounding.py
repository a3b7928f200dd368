"""Rules that choose the main branch's codes: nearest, in a searched range, with AWQ's channel scales, or by GPTQ.

All rules stay on the scheme's number grid, so a low-rank correction can follow each of them in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qe_edge.numerics.channel_scales import power_scale, storable_inverse
from qe_edge.numerics.grids import (
    PER_CHANNEL,
    QuantizedWeight,
    WeightGrid,
    quantize_weight,
    round_on_grid,
    scales_of_range,
    split_groups,
)
from qe_edge.numerics.matrices import Matrix, to_tensor
from qe_edge.reconstruction.polishing import polished
from qe_edge.system.device import CPU
from qe_edge.system.errors import NumericalError
from qe_edge.system.parallel import map_rows

BLOCK = 128  # columns whose updates GPTQ applies to the rest at once
SMALL_BLOCK = 32  # columns whose updates it applies to the rest of the block at once
ROWS = 4096  # output channels that GPTQ rounds at a time
CACHED = 1 << 17  # weights whose range is searched at a time: their float32 values stay in a core's cache
AWQ_STEPS = 20
CLIP_STEPS, CLIP_LEAST = 9, 0.5  # ranges tried: from the whole down to half of it
CLIP_FINER = (-2 / 48, -1 / 48, 1 / 48, 2 / 48)  # and those around the best: 3e-4 above trying all at this distance


@dataclass(frozen=True, eq=False)
class Hessian:
    """A Gram matrix for GPTQ that is factored once, however many weights are rounded with it.

    Attributes:
        gram: `[in, in]` float32 or float64, `X^T X` up to a factor. It must not be changed later.

    Example:
        >>> hessian = Hessian(np.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> round(float(hessian.coupling(0.0)[0, 1]), 4)  # column 1 makes up for half of an error in column 0
        0.5
    """

    gram: Matrix
    _couplings: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)

    def coupling(self, damping: float) -> Tensor:
        """`R_ij / R_jj` `[in, in]` float32 of the damped matrix `R R^T` (see `gptq_round`).

        Raises:
            NumericalError: If the damped matrix is not positive definite.
        """
        if damping not in self._couplings:
            self._couplings[damping] = _coupling(self.gram, damping)
        return self._couplings[damping]


@dataclass(frozen=True)
class Rounding:
    """Choice of the codes.

    Attributes:
        kind: "nearest", "awq" (searched channel scales, then nearest) or "gptq".
        clip: Search the range of every scale for "nearest" and "gptq".
        damping: Of GPTQ's Hessian, relative to the mean of its diagonal.
        polish: Rounds in which GPTQ's codes and scales are chosen again, each given all others.

    Example:
        >>> weight = torch.tensor([[0.7, 0.26, -0.1]])
        >>> codes, inverse = Rounding("gptq")(weight, WeightGrid(4), np.eye(3), abs_mean=np.ones(3))
        >>> codes.codes.tolist(), inverse
        ([[7, 3, -1]], None)
        >>> Rounding("gptq")(weight, WeightGrid(4), None, abs_mean=np.ones(3))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: Rounding 'gptq' needs the Gram matrix. Pass calibration tokens.
    """

    kind: Literal["nearest", "awq", "gptq"] = "nearest"
    clip: bool = False
    damping: float = 0.01
    polish: int = 0

    def __call__(
        self, weight: Tensor, grid: WeightGrid, gram: Matrix | Hessian | None, abs_mean: np.ndarray
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
        if self.kind == "gptq":
            codes = gptq_round(weight, gram, grid, self.damping, clip=self.clip)
            if self.polish:
                matrix = gram.gram if isinstance(gram, Hessian) else gram
                codes = polished(codes, weight, matrix, grid, self.damping, self.polish)
            return codes, None
        matrix = to_tensor(gram.gram if isinstance(gram, Hessian) else gram)
        if self.kind == "awq":
            return search_scale(weight, abs_mean, matrix.float(), grid, AWQ_STEPS)
        return clipped_round(weight, grid, matrix.diagonal().float()), None


def clipped_round(weight: Tensor, grid: WeightGrid, importance: Tensor) -> QuantizedWeight:
    """Nearest codes in the range, between the whole and half of it, that loses least; one search per scale.

    Args:
        weight: `[out, in]` float32.
        grid: Grid of the codes.
        importance: `[in]` mean square of every input, which weighs the squared errors.

    Example:
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


def search_scale(
    weight: Tensor, abs_mean: np.ndarray, gram: Tensor, grid: WeightGrid, steps: int
) -> tuple[QuantizedWeight, Tensor]:
    """AWQ (MLSys 2024): the channel scale, a power of `abs_mean`, that loses least.

    Args:
        weight: `[out, in]` float32.
        abs_mean: `[in]` mean |x|.
        gram: `[in, in]` float32.
        grid: Grid of the codes.
        steps: Number of powers to try.

    Returns:
        The codes of the scaled weight, and `1 / s` float16 `[in]`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(16, 32), torch.randn(200, 32)
        >>> tokens[:, 5] *= 30  # an outlier channel
        >>> gram, abs_mean = tokens.T @ tokens / 200, tokens.abs().mean(0).double().numpy()
        >>> codes, inverse = search_scale(weight, abs_mean, gram, WeightGrid(4), steps=20)
        >>> int(inverse.argmin())
        5
    """
    best = None
    for step in range(steps):
        inverse = storable_inverse(power_scale(abs_mean, step / steps)).to(weight.device)
        codes = quantize_weight(weight / inverse.float(), grid)
        error = weight - codes.decode() * inverse.float()
        loss = float(((error @ gram) * error).sum())
        if best is None or loss < best[0]:
            best = loss, codes, inverse
    if best is None:
        raise ValueError("steps must be positive")
    return best[1], best[2]


def gptq_round(
    weight: Tensor,
    gram: Matrix | Hessian,
    grid: WeightGrid,
    damping: float,
    *,
    clip: bool = False,
) -> QuantizedWeight:
    """GPTQ (ICLR 2023) without column reordering: later columns make up for the error of each column.

    The codes are those of the usual form with the inverse of the Hessian `H`, which is not needed here. With
    `H = R R^T`, R upper triangular, the loss is a sum over columns j of `(R_jj e_j + sum_{i < j} R_ij e_i)^2`, `e` the
    errors. So column j is rounded after adding `sum_{i < j} R_ij / R_jj e_i` (Babai's nearest plane; Chen et al., arXiv
    2507.18553). One Cholesky factor is a quarter of the work of inverting and factoring again.

    Args:
        weight: `[out, in]` float32, on the Gram matrix's device, as the codes are.
        gram: `[in, in]`, `X^T X` up to a factor; a `Hessian` where several weights are rounded with it.
        grid: Grid of the codes. A group's scale is found when its turn comes, from the weights as updated so far.
        damping: Relative to the mean of the Gram matrix's diagonal.
        clip: Search the range of every scale, as `clipped_round`.

    Raises:
        NumericalError: If the damped Gram matrix is still not positive definite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight, grid = torch.randn(16, 64), WeightGrid(4)
        >>> tokens = torch.randn(200, 8) @ torch.randn(8, 64)  # inputs that depend on each other
        >>> gram = (tokens.T @ tokens / 200).numpy()
        >>> def error(codes: QuantizedWeight) -> float:
        ...     return float((tokens @ (codes.decode() - weight).T).square().mean())
        >>> error(gptq_round(weight, gram, grid, damping=0.01)) < error(quantize_weight(weight, grid)) / 2
        True
    """
    hessian = gram if isinstance(gram, Hessian) else Hessian(gram)
    there = isinstance(hessian.gram, Tensor)
    diagonal = to_tensor(hessian.gram).diagonal().clone()
    dead = (diagonal == 0) & diagonal.any()  # inputs that are all zero say nothing of any channel
    coupling = hessian.coupling(damping)
    importance = diagonal.float() if clip else None
    kept = weight.float().masked_fill(dead, 0.0)
    columns = _round_at_once if there else _round_in_turn
    piece = len(kept) if there else ROWS  # a device has all rows in one go, and no threads
    parts = map_rows(lambda rows: _round_rows(kept[rows], coupling, grid, importance, columns), len(kept), piece)
    codes, scales, zeros = zip(*parts, strict=True)
    joined = None if grid.symmetric else torch.cat(zeros)
    return QuantizedWeight(torch.cat(codes), torch.cat(scales), joined, grid.bits, grid.resolve_group(weight.shape[1]))


def _round_rows(
    weight: Tensor, coupling: Tensor, grid: WeightGrid, importance: Tensor | None, columns: _Columns
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`gptq_round` for some rows, which do not depend on each other: codes, scales and zero points."""
    # inputs lie along the rows, so that a column of the weight is contiguous
    original = weight.T.contiguous()
    w = original.clone()
    in_features = len(w)
    group = grid.resolve_group(in_features)
    width = in_features if group == PER_CHANNEL else group
    codes, errors = torch.empty_like(w, dtype=torch.int8), torch.empty_like(w)
    found: list[tuple[Tensor, Tensor | None]] = []
    step = min(width, SMALL_BLOCK)  # a group's size is a power of two or the whole width: one scale for so many columns
    scale, point = torch.ones_like(w[0]), torch.zeros_like(w[0])
    for block in range(0, in_features, BLOCK):
        block_stop = min(block + BLOCK, in_features)
        for start in range(block, block_stop, SMALL_BLOCK):
            stop = min(start + SMALL_BLOCK, block_stop)
            for first in range(start, stop, step):
                if first % width == 0:  # none of the group's columns waits for an update
                    span = slice(first, first + width)
                    ahead = _expected(original[span], w[span], coupling[span, span]) if first else w[span]
                    weighing = None if importance is None else importance[span]
                    found.append(_group_range(ahead.T.contiguous(), grid, weighing))
                    scale, point = (part[:, 0].float() if part is not None else point for part in found[-1])
                last, inside = min(first + step, stop), slice(first, stop)
                columns(
                    _Span(original[inside], w[inside], coupling[inside, inside], codes[inside], errors[inside]),
                    last - first, scale, point, grid.limits,
                )  # fmt: skip
            w[stop:block_stop].addmm_(coupling[start:stop, stop:block_stop].T, errors[start:stop])
        w[block_stop:].addmm_(coupling[block:block_stop, block_stop:].T, errors[block:block_stop])
    scales = torch.cat([part[0] for part in found], dim=1)
    zeros = [part[1] for part in found if part[1] is not None]
    return codes.T.contiguous(), scales, torch.cat(zeros, dim=1) if zeros else None


@dataclass(frozen=True)
class _Span:
    """Neighbouring columns `[width, out]` of a weight, the first of which are rounded now; the others wait for them.

    Attributes:
        original: What is to be rounded.
        w: The same with what makes up for earlier errors.
        coupling: `[width, width]`.
        codes: Int8, to be written.
        errors: `original` minus what the codes decode to, to be written.
    """

    original: Tensor
    w: Tensor
    coupling: Tensor
    codes: Tensor
    errors: Tensor


_Columns = Callable[[_Span, int, Tensor, Tensor, tuple[int, int]], None]


def _round_in_turn(span: _Span, count: int, scale: Tensor, point: Tensor, limits: tuple[int, int]) -> None:
    """Round the first `count` columns of a span on scales and zero points `[out]`, and update the others after each."""
    for column in range(count):
        code = torch.round(span.w[column] / scale).add_(point).clamp_(*limits)
        span.codes[column] = code
        torch.sub(span.original[column], code.sub_(point).mul_(scale), out=span.errors[column])
        span.w[column + 1 :].addr_(span.coupling[column, column + 1 :], span.errors[column])


def _round_at_once(span: _Span, count: int, scale: Tensor, point: Tensor, limits: tuple[int, int]) -> None:
    """The same in four operations a column, each of which costs a device its start: on the grid's own axis."""
    columns = _columns_on_grid(count, span.w.shape[1], limits, span.w.device)
    columns.original.copy_(span.original[:count] / scale + point)
    columns.w.copy_(span.w[:count] / scale + point)
    columns.coupling.copy_(span.coupling[:count, :count].triu(1))  # a column changes those after it only
    columns.round()
    span.codes[:count] = columns.codes
    span.errors[:count] = columns.errors * scale
    span.w[count:].addmm_(span.coupling[:count, count:].T, span.errors[:count])


class _ColumnsOnGrid:
    """Neighbouring columns `[width, out]` in steps of their scales, rounded one after the other.

    CUDA records the operations once and starts them all together from then on: one by one, each would wait for Python.

    Attributes:
        original: What is to be rounded. Written by the caller, as are `w` and `coupling`.
        w: The same with what makes up for earlier errors.
        coupling: `[width, width]`, zero on and below the diagonal.
        codes: Whole numbers.
        errors: `original` minus the codes.
    """

    def __init__(self, width: int, out: int, limits: tuple[int, int], device: torch.device) -> None:
        self.original, self.w, self.codes, self.errors = torch.zeros(4, width, out, device=device).unbind()
        self.coupling = torch.zeros(width, width, device=device)
        self._limits = limits
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._in_turn()  # what a library sets up at its first call must not be recorded
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._in_turn()

    def round(self) -> None:
        """Write codes and errors; `w` changes."""
        if self._graph is None:
            self._in_turn()
        else:
            self._graph.replay()

    def _in_turn(self) -> None:
        parts = (self.original, self.w, self.codes, self.errors, self.coupling)
        for wanted, value, code, error, share in zip(*(part.unbind() for part in parts), strict=True):
            torch.round(value, out=code).clamp_(*self._limits)
            torch.sub(wanted, code, out=error)
            self.w.addr_(share, error)


_columns_on_grid = lru_cache(maxsize=16)(_ColumnsOnGrid)


def _expected(original: Tensor, w: Tensor, coupling: Tensor) -> Tensor:
    """What the columns of a group `[width, out]` are going to be when their turn comes, were none of them rounded."""
    ahead: Tensor = torch.linalg.solve_triangular(coupling.T, w - original, upper=False, unitriangular=True)
    return original + ahead


def _group_range(columns: Tensor, grid: WeightGrid, importance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point `[out, 1]` of one group `[out, width]`, in a searched range where errors have a weight."""
    whole = replace(grid, group_size=PER_CHANNEL)
    if importance is not None:
        return search_range(columns, whole, importance)
    return scales_of_range(columns.amin(1, keepdim=True), columns.amax(1, keepdim=True), whole)


def _coupling(gram: Matrix, damping: float) -> Tensor:
    """`R_ij / R_jj` `[in, in]` float32 of the damped Gram matrix `R R^T`; what is below the diagonal means nothing.

    The lower Cholesky factor of the matrix with its channels in reverse order is R, read backwards. A Gram matrix in
    float32 is factored in float32, unless that fails: its own rounding is as large. torch's LAPACK lets other threads
    work meanwhile; scipy's does not.
    """
    matrix = to_tensor(gram)
    for precision in (torch.float32, torch.float64)[matrix.dtype != torch.float32 :]:
        hessian = matrix.to(precision).flip((0, 1))
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1.0
        diagonal += damping * float(diagonal.mean(dtype=torch.float64))
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            break
    else:
        raise NumericalError("The Gram matrix is not positive definite.", "Raise the option 'damping'.")
    size, pivots = len(lower), lower.diagonal()
    # a Hessian in float32 is done with, and its memory is free
    transposed = hessian if hessian.dtype == torch.float32 else torch.zeros(size, size, device=matrix.device)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        columns = lower.T[start:stop, start:] / pivots[start:stop, None]
        transposed[size - stop : size - start, : size - start] = columns.flip((0, 1))
    return transposed.T
