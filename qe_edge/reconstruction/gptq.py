"""GPTQ: columns are rounded in turn, and later ones make up for the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from qe_edge.numerics.grids import PER_CHANNEL, QuantizedWeight, WeightGrid, scales_of_range
from qe_edge.numerics.matrices import Matrix, to_tensor
from qe_edge.reconstruction.range_search import search_range
from qe_edge.system.device import CPU
from qe_edge.system.errors import NumericalError
from qe_edge.system.parallel import map_rows

BLOCK = 128  # columns whose updates GPTQ applies to the rest at once
SMALL_BLOCK = 32  # columns whose updates it applies to the rest of the block at once
WIDE = 12288  # inputs from which a factored Gram matrix takes more than 600 MB: only one of a layer is kept
ROWS, WEIGHTS = 4096, 1 << 24  # output channels and weights that GPTQ rounds at a time, at most
REVERSED = 1 << 20  # numbers of a matrix that trade places at a time


@dataclass(frozen=True, eq=False)
class Hessian:
    """A Gram matrix for GPTQ that is factored once, however many weights are rounded with it.

    Attributes:
        gram: `[in, in]` float32 or float64, `X^T X` up to a factor. It must not be changed later.
        left_out: Channels that count as inputs that are always zero.
        kept: Whether its factors stay in memory for the next weight.

    Example:
        >>> hessian = Hessian(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> round(float(hessian.coupling(0.0)[0, 1]), 4)  # column 1 makes up for half of an error in column 0
        0.5
        >>> float(Hessian(hessian.gram, left_out=np.array([1])).coupling(0.0)[0, 1])
        0.0
    """

    gram: Matrix
    left_out: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    kept: bool = True
    _couplings: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)

    def without(self, channels: np.ndarray) -> Hessian:
        """The same with more channels left out. A wide one forgets its own factors: there is memory for one."""
        if not len(channels):
            return self
        if len(self.gram) > WIDE:
            self._couplings.clear()
        return Hessian(self.gram, np.union1d(self.left_out, channels), kept=False)

    def matrix(self) -> Matrix:
        """The Gram matrix with zeros for the channels that are left out; a copy if there are any."""
        if not len(self.left_out):
            return self.gram
        matrix = self.gram.clone() if isinstance(self.gram, Tensor) else self.gram.copy()
        _clear(to_tensor(matrix), self.left_out)
        return matrix

    def diagonal(self) -> Tensor:
        """Its diagonal `[in]`, the mean square of every input."""
        diagonal = to_tensor(self.gram).diagonal().clone()
        diagonal[torch.from_numpy(self.left_out)] = 0.0
        return diagonal

    def coupling(self, damping: float) -> Tensor:
        """`R_ij / R_jj` `[in, in]` float32 of the damped matrix `R R^T` (see `gptq_round`).

        Raises:
            NumericalError: If the damped matrix is not positive definite.
        """
        found = self._couplings.get(damping)
        if found is None:
            found = _coupling(to_tensor(self.gram), self.left_out, damping)
            if self.kept:
                self._couplings[damping] = found
        return found


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
        >>> from qe_edge.numerics.grids import quantize_weight
        >>> weight, grid = torch.randn(16, 64), WeightGrid(4)
        >>> tokens = torch.randn(200, 8) @ torch.randn(8, 64)  # inputs that depend on each other
        >>> gram = tokens.T @ tokens / 200
        >>> def error(codes: QuantizedWeight) -> float:
        ...     return float((tokens @ (codes.decode() - weight).T).square().mean())
        >>> error(gptq_round(weight, gram, grid, damping=0.01)) < error(quantize_weight(weight, grid)) / 2
        True
    """
    hessian = gram if isinstance(gram, Hessian) else Hessian(gram)
    there = isinstance(hessian.gram, Tensor)
    diagonal = hessian.diagonal()
    dead = (diagonal == 0) & diagonal.any()  # inputs that are all zero say nothing of any channel
    coupling = hessian.coupling(damping)
    importance = diagonal.float() if clip else None
    kept = weight.float().masked_fill(dead, 0.0) if dead.any() else weight.float()
    columns = _round_at_once if there else _round_in_turn
    piece = len(kept) if there else _piece(*kept.shape)  # a device has all rows in one go, and no threads
    parts = map_rows(lambda rows: _round_rows(kept[rows], coupling, grid, importance, columns), len(kept), piece)
    codes, scales, zeros = zip(*parts, strict=True)
    joined = None if grid.symmetric else torch.cat(zeros)
    return QuantizedWeight(torch.cat(codes), torch.cat(scales), joined, grid.bits, grid.resolve_group(weight.shape[1]))


def _piece(rows: int, columns: int) -> int:
    """Rows that are rounded at a time: an even number of parts where not all can be at once, since threads share them.

    Three float32 matrices of the part are in memory.
    """
    most = max(1, min(ROWS, WEIGHTS // columns))
    return rows if rows <= most else -(-rows // (2 * -(-rows // (2 * most))))


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


def _coupling(gram: Tensor, left_out: np.ndarray, damping: float) -> Tensor:
    """`R_ij / R_jj` `[in, in]` float32 of the damped Gram matrix `R R^T`; what is below the diagonal means nothing.

    The lower Cholesky factor of the matrix with its channels in reverse order is R, read backwards. It takes the place
    of that matrix, since wide layers have matrices of gigabytes. A Gram matrix in float32 is factored in float32,
    unless that fails: its own rounding is as large. torch's LAPACK lets other threads work meanwhile; scipy's does not.
    """
    for precision in (torch.float32, torch.float64)[gram.dtype != torch.float32 :]:
        matrix = gram.to(precision).flip((0, 1))
        _clear(matrix, len(matrix) - 1 - left_out)
        diagonal = matrix.diagonal()
        diagonal[diagonal == 0] = 1.0
        diagonal += damping * float(diagonal.mean(dtype=torch.float64))
        columns = matrix.mT  # in the order of LAPACK, which then needs no other memory
        if matrix.device == CPU:
            failed = torch.linalg.cholesky_ex(columns, out=(columns, torch.zeros((), dtype=torch.int32)))[1]
        else:
            factor, failed = torch.linalg.cholesky_ex(matrix)
            matrix = factor.mT.contiguous()
        if not failed:
            break
    else:
        raise NumericalError("The Gram matrix is not positive definite.", "Raise the option 'damping'.")
    matrix /= matrix.diagonal().clone().unsqueeze(1)
    _reverse(matrix.view(-1))
    return matrix.float().mT


def _clear(matrix: Tensor, channels: np.ndarray) -> None:
    """Set rows and columns of a matrix `[in, in]` to zero."""
    if len(channels):
        numbers = torch.from_numpy(channels).to(matrix.device)
        matrix[numbers, :] = 0.0
        matrix[:, numbers] = 0.0


def _reverse(numbers: Tensor) -> None:
    """Reverse the order of `numbers` `[n]`, in place."""
    count = len(numbers)
    for start in range(0, count // 2, REVERSED):
        stop = min(start + REVERSED, count // 2)
        front, back = numbers[start:stop], numbers[count - stop : count - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
