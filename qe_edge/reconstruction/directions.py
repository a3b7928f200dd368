"""Best output directions for a low-rank correction, without inverses or damping (docs/method.md, section 5.3).

The optimal rank-r correction of an error `E` under the Gram matrix `G` is `U U^T E`, with `U` the top eigenvectors of
`E G E^T`. When there are more outputs than inputs the same problem is solved in the column space of `E` (`E = B R`, R
the Cholesky factor of `E^T E`), so the eigenproblem always has the smaller side's size and a singular Gram matrix is
fine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh, qr, solve_triangular
from scipy.linalg.lapack import dpotrf, spotrf
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from qe_edge.numerics.matrices import Matrix, cast
from qe_edge.system.blas import one_lapack_thread
from qe_edge.system.device import multiplies_bfloat16

# ratio of pivots of R, computed in that precision, up to which E R^{-1} is orthonormal enough to be finished by one QR
STEEPEST = {np.float32: 30, np.float64: 1e5}
LONG_SUM = 4096  # inputs from which outputs on tokens come from bfloat16
PANEL = 512  # columns of a symmetric matrix that are multiplied at a time
FEW = 1 / 8  # share of a matrix's eigenvectors up to which LAPACK finds them faster without the others
EXACT_SIDE = 256  # side of an eigenproblem from which block Krylov steps are faster than LAPACK
KRYLOV_STEPS, KRYLOV_EXTRA = 5, 8  # products with the matrix, and directions beyond those wanted
SHIFT, TINY = 1e-13, 1e-300  # relative to a block's energy, and absolute: they keep Cholesky's pivots above 0
NARROW, NARROW_STEPS = 32, 7  # directions that a device starts from, and steps besides the steps for the rank
WARM_STEPS = 3  # products that suffice from the directions of a similar matrix


@dataclass(frozen=True)
class ErrorSpace:
    """An error matrix in coordinates of its smaller side.

    Attributes:
        reduced: `[side, in]`, `error = basis @ reduced`.
        basis: `[out, side]` orthonormal columns, or None.
        tall: `[out, in]` the error itself, where the basis is `tall @ inv(reduced)` and never formed; or None. Without
            either, the coordinates are the outputs themselves.

    Example:
        >>> tall = np.random.default_rng(0).standard_normal((64, 8))
        >>> space = ErrorSpace.of(tall)
        >>> space.side, space.covariance(np.eye(8)).shape
        (8, (8, 8))
        >>> directions = top_eigenvectors(space.covariance(np.eye(8)), rank=2)
        >>> space.lift(directions).shape
        (64, 2)
    """

    reduced: Matrix
    basis: Matrix | None = None
    tall: Matrix | None = None

    @classmethod
    def of(cls, error: Matrix) -> ErrorSpace:
        """Coordinates for `error` `[out, in]`."""
        out_features, in_features = error.shape
        if out_features <= in_features:
            return cls(error)
        if isinstance(error, Tensor):
            return cls._of_tall(error)
        for precision, factor in ((np.float32, spotrf), (np.float64, dpotrf))[error.dtype != np.float32 :]:
            tall = error.astype(precision, copy=False)
            upper, failed = factor(tall.T @ tall, lower=0, clean=1)
            pivots = np.abs(upper.diagonal())
            if not failed and pivots.max() <= STEEPEST[precision] * pivots.min():
                return cls(upper.astype(np.float64, copy=False), tall=error)
        with one_lapack_thread():
            basis, reduced = qr(error.astype(np.float64), mode="economic")
        return cls(reduced, basis=basis)

    @classmethod
    def _of_tall(cls, error: Tensor) -> ErrorSpace:
        """Coordinates for a tall error on a device, where R stays in the precision that it was computed in."""
        for precision, steepest in ((torch.float32, np.float32), (torch.float64, np.float64))[
            error.dtype != torch.float32 :
        ]:
            tall = error.to(precision)
            lower, failed = torch.linalg.cholesky_ex(tall.T @ tall)
            pivots = lower.diagonal().abs()
            if not failed and pivots.max() <= STEEPEST[steepest] * pivots.min():
                return cls(lower.T, tall=error)
        basis, reduced = torch.linalg.qr(error.double())
        return cls(reduced, basis=basis)

    @property
    def side(self) -> int:
        """Size of the eigenproblem, min(out, in)."""
        return len(self.reduced)

    def error(self) -> Matrix:
        """The error itself, `[out, in]`."""
        if self.tall is not None:
            return self.tall
        return self.reduced if self.basis is None else self.basis @ self.reduced

    def outputs(self, tokens: Matrix) -> Matrix:
        """Reduced coordinates `[n, side]` of the error's output on tokens `[n, in]`.

        For wide inputs they are computed in bfloat16 if the processor multiplies it. That is twice as fast, and the
        rounding errors of so many products average out.
        """
        reduced = cast(self.reduced, tokens)
        if isinstance(tokens, Tensor):
            return tokens @ reduced.T
        if tokens.dtype != np.float32 or tokens.shape[1] < LONG_SUM or not multiplies_bfloat16():
            return np.asarray(tokens @ reduced.T)
        narrow = [torch.from_numpy(part).bfloat16() for part in (tokens, reduced)]
        return np.asarray((narrow[0] @ narrow[1].T).float().numpy())

    def covariance(self, gram: Matrix) -> Matrix:
        """`E G E^T` in reduced coordinates, `[side, side]` float64; on a device in the precision of the error."""
        left = self.reduced
        gram = cast(gram, left)
        if isinstance(gram, Tensor):
            whole = left @ gram @ left.T
            return (whole + whole.T) / 2
        # G is its lower triangle of blocks, with half of those on the diagonal, and the same transposed
        product = np.empty_like(left)
        for start in range(0, len(gram), PANEL):
            own, below = slice(start, start + PANEL), slice(start + PANEL, None)
            product[:, own] = left[:, own] @ gram[own, own] / 2 + left[:, below] @ gram[below, own]
        half = product @ left.T
        return np.asarray(half + half.T, np.float64)

    def lift(self, directions: Matrix) -> Matrix:
        """Orthonormal directions `[side, r]` as orthonormal columns in output coordinates `[out, r]`, float64."""
        if self.basis is not None:
            return self.basis @ directions
        if self.tall is not None and isinstance(directions, Tensor):
            solved = torch.linalg.solve_triangular(self.reduced, cast(directions, self.reduced), upper=True)
            return orthonormal(self.tall @ cast(solved, self.tall)).double()
        if self.tall is None or not directions.shape[1]:
            return np.zeros((len(self.tall), 0)) if self.tall is not None else directions
        inner = solve_triangular(self.reduced, directions).astype(self.tall.dtype)
        with one_lapack_thread():
            columns, mixing = qr((self.tall @ inner).astype(np.float64), mode="economic")
        return np.asarray(columns * np.sign(mixing.diagonal()))

    def coordinates(self, columns: Matrix) -> Matrix:
        """Inner products `[side, r]` of the basis with columns `[out, r]` in output coordinates."""
        if self.basis is not None:
            return self.basis.T @ columns
        if self.tall is None:
            return columns
        products = self.tall.T @ cast(columns, self.tall)
        if isinstance(products, Tensor):
            return torch.linalg.solve_triangular(self.reduced.T, cast(products, self.reduced), upper=False)
        return np.asarray(solve_triangular(self.reduced, products, trans="T"))


def top_eigenvectors(matrix: Matrix, rank: int) -> Matrix:
    """Eigenvectors `[n, rank]` of the largest eigenvalues of a symmetric matrix, largest first.

    On a device the leading directions stand for the eigenvectors of a large positive matrix. They leave at most 1e-3
    more energy, and that only where nothing but noise is left.

    Example:
        >>> vectors = top_eigenvectors(np.diag([1.0, 9.0, 4.0]), rank=2)
        >>> np.abs(vectors).round(6)
        array([[0., 0.],
               [1., 0.],
               [0., 1.]])
    """
    size = len(matrix)
    rank = min(rank, size)
    if isinstance(matrix, Tensor):
        start = filled(matrix.new_zeros(1, size, 0), NARROW)
        return krylov_directions(lambda block: matrix @ block, start, rank, NARROW_STEPS + rank // 16)[0]
    if rank == 0:
        return np.zeros((size, 0))
    with one_lapack_thread():
        return _top(matrix, rank)


def _top(matrix: np.ndarray, rank: int) -> np.ndarray:
    """`top_eigenvectors` in as many threads as the caller allows, for a rank from 1 to n."""
    size, symmetric = len(matrix), (matrix + matrix.T) / 2
    if rank > FEW * size:  # scipy's evr takes longer than all by numpy's evd, and stops other threads meanwhile
        vectors = np.linalg.eigh(symmetric)[1][:, size - rank :]
    else:
        vectors = eigh(symmetric, driver="evr", subset_by_index=[size - rank, size - 1])[1]
    flipped: np.ndarray = vectors[:, ::-1]
    return flipped


def leading_directions(
    matrix: np.ndarray | LinearOperator, start: np.ndarray, rank: int, steps: int = KRYLOV_STEPS
) -> np.ndarray:
    """Directions `[n, rank]` that capture about as much of a positive matrix as its top eigenvectors.

    Block Krylov iteration (Musco and Musco, NeurIPS 2015) from directions close to the wanted ones; below `EXACT_SIDE`
    the eigenvectors themselves. Each step costs one product with the matrix. The caller limits the threads of LAPACK.

    Args:
        matrix: `[n, n]` symmetric, float32 or float64; it only has to be multiplied with blocks of columns.
        start: `[n, k]` directions to start from, in any number; random ones fill them up.
        rank: Wanted number of directions.
        steps: Products with the matrix.

    Example:
        >>> matrix = np.diag([1.0, 9.0, 4.0])
        >>> np.abs(leading_directions(matrix, start=np.zeros((3, 0)), rank=1)).round(6)
        array([[0.],
               [1.],
               [0.]])
    """
    size = matrix.shape[0]
    width = min(rank, size) + KRYLOV_EXTRA
    if size <= EXACT_SIDE or width * (KRYLOV_STEPS + 1) > size:
        whole = matrix if isinstance(matrix, np.ndarray) else matrix @ np.eye(size, dtype=matrix.dtype)
        return _top(whole, min(rank, size))
    if start.shape[1] < width:
        more = np.random.default_rng(0).standard_normal((size, width - start.shape[1]))
        start = np.concatenate((start, more / np.sqrt(size)), axis=1)
    space = qr(start[:, :width].astype(matrix.dtype), mode="economic")[0]
    product = image = matrix @ space
    for _ in range(steps):
        block = product
        for _ in range(2):  # once leaves what rounding makes of nearly dependent columns
            block = block - space @ (space.T @ block)
            block = qr(block, mode="economic")[0]
        product = matrix @ block
        space, image = np.concatenate((space, block), axis=1), np.concatenate((image, product), axis=1)
    inner = _top((space.T @ image).astype(np.float64), rank)
    directions: np.ndarray = space.astype(np.float64) @ inner
    return directions


def krylov_directions(multiply: Callable[[Tensor], Tensor], start: Tensor, rank: int, steps: int) -> Tensor:
    """`leading_directions` of several matrices at once on a device, `[matrices, n, rank]` float64.

    Args:
        multiply: Multiplies every matrix with a block of columns of its own, `[matrices, n, k]`.
        start: `[matrices, n, k]` in the precision of the products; `filled` adds random ones.
        rank: Wanted number of directions.
        steps: Products with the matrices; there are more directions to choose from than are wanted, k after each.

    Example:
        >>> matrices = torch.diag_embed(torch.tensor([[1.0, 9.0, 4.0], [5.0, 2.0, 1.0]]))
        >>> start = filled(torch.zeros(2, 3, 0), width=2)
        >>> found = krylov_directions(lambda block: matrices @ block, start, rank=1, steps=3)
        >>> found.abs().squeeze(2)
        tensor([[0., 1., 0.],
                [1., 0., 0.]], dtype=torch.float64)
    """
    count, size, width = start.shape
    rank = min(rank, size)
    if size <= EXACT_SIDE or width * (steps + 1) > size:
        whole = multiply(torch.eye(size, dtype=start.dtype, device=start.device).expand(count, size, size)).double()
        exact: Tensor = torch.linalg.eigh((whole + whole.mT) / 2)[1][:, :, size - rank :].flip(2)
        return exact
    space = orthonormal(start)
    product = image = multiply(space)
    for _ in range(steps):
        block = orthonormal(product, space)
        product = multiply(block)
        space, image = torch.cat((space, block), dim=2), torch.cat((image, product), dim=2)
    inner = (space.mT @ image).double()
    vectors: Tensor = torch.linalg.eigh((inner + inner.mT) / 2)[1][:, :, inner.shape[1] - rank :].flip(2)
    return space.double() @ vectors


def filled(start: Tensor, width: int) -> Tensor:
    """Directions `[matrices, n, k]` with random ones up to `width`, the same for every matrix.

    Example:
        >>> tuple(filled(torch.zeros(2, 300, 5), width=24).shape)
        (2, 300, 24)
    """
    count, size, known = start.shape
    more = np.random.default_rng(0).standard_normal((size, max(width - known, 0))) / np.sqrt(size)
    return torch.cat((start, torch.from_numpy(more).to(start).expand(count, -1, -1)), dim=2)


def orthonormal(block: Tensor, space: Tensor | None = None) -> Tensor:
    """Orthonormal columns `[..., n, k]` that span a block's columns, without their part in an orthonormal `space`.

    Cholesky factors in float64, used twice: after one pass, rounding errors of nearly dependent columns are left. On a
    device that is many times faster than Householder's QR. A column with no part left becomes shorter than 1, or zero.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> columns = orthonormal(torch.randn(100, 3))
        >>> (columns.T @ columns).round(decimals=4).abs()
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    for _ in range(2):
        if space is not None:
            block = block - space @ (space.mT @ block)
        wide = block.double()
        products = wide.mT @ wide
        diagonal = products.diagonal(dim1=-2, dim2=-1)
        diagonal += SHIFT * diagonal.sum(-1, keepdim=True) + TINY
        lower = torch.linalg.cholesky_ex(products)[0]
        block = torch.linalg.solve_triangular(lower, wide.mT, upper=False).mT.to(block.dtype)
    return block


def without(covariance: Matrix, own: Matrix) -> Matrix:
    """Covariance `[side, side]` of the error that a correction by leading directions `own` `[side, r]` leaves.

    Example:
        >>> without(np.diag([9.0, 4.0, 1.0]), np.array([[1.0], [0.0], [0.0]]))
        array([[0., 0., 0.],
               [0., 4., 0.],
               [0., 0., 1.]])
    """
    own = cast(own, covariance)
    captured = own @ (own.T @ covariance)  # eigenvectors commute with the covariance
    if isinstance(captured, Tensor):  # close to eigenvectors
        left = covariance - captured
        left -= (left @ own) @ own.T
        return (left + left.T) / 2
    return covariance - (captured + captured.T) / 2


def whitened_directions(error: Matrix, gram: Matrix, rank: int) -> Matrix:
    """Directions `U` `[out, r]` of the rank-r correction `U U^T E` that is optimal for `||(E - L) X||_F`.

    Args:
        error: `[out, in]`.
        gram: `[in, in]`, `X^T X` up to a factor; may be singular.
        rank: Wanted rank; capped at min(out, in).

    Example:
        >>> error = np.outer([3.0, 4.0], [1.0, 2.0])
        >>> np.abs(whitened_directions(error, np.eye(2), rank=1)).round(6)
        array([[0.6],
               [0.8]])
    """
    space = ErrorSpace.of(error)
    return space.lift(top_eigenvectors(space.covariance(gram), rank))


def diagonal_directions(error: np.ndarray, weights: np.ndarray, rank: int) -> Matrix:
    """Directions `[out, r]` of the best rank-r correction of `E diag(weights)` (plain SVD weighting).

    Example:
        >>> error = np.eye(2)
        >>> np.abs(diagonal_directions(error, weights=np.array([1.0, 5.0]), rank=1)).round(6)
        array([[0.],
               [1.]])
    """
    space = ErrorSpace.of(error * weights.astype(error.dtype))
    return space.lift(top_eigenvectors((space.reduced @ space.reduced.T).astype(np.float64), rank))
