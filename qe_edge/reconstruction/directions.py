"""Best output directions for a low-rank correction, without inverses or damping (docs/method.md, section 5.3).

The optimal rank-r correction of an error `E` under the Gram matrix `G` is `U U^T E`, with `U` the top eigenvectors of
`E G E^T`. When there are more outputs than inputs the same problem is solved in the column space of `E` (`E = B R`, R
the Cholesky factor of `E^T E`), so the eigenproblem always has the smaller side's size and a singular Gram matrix is
fine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh, qr, solve_triangular
from scipy.linalg.lapack import dpotrf, spotrf
from scipy.sparse.linalg import LinearOperator

from qe_edge.blas import one_lapack_thread
from qe_edge.device import multiplies_bfloat16

# ratio of pivots of R, computed in that precision, up to which E R^{-1} is orthonormal enough to be finished by one QR
STEEPEST = {np.float32: 30, np.float64: 1e5}
LONG_SUM = 4096  # inputs from which outputs on tokens come from bfloat16
PANEL = 512  # columns of a symmetric matrix that are multiplied at a time
FEW = 1 / 8  # share of a matrix's eigenvectors up to which LAPACK finds them faster without the others
EXACT_SIDE = 256  # side of an eigenproblem from which block Krylov steps are faster than LAPACK
KRYLOV_STEPS, KRYLOV_EXTRA = 5, 8  # products with the matrix, and directions beyond those wanted
WARM_STEPS = 3  # products that suffice from the directions of a matrix that is much alike


@dataclass(frozen=True)
class ErrorSpace:
    """An error matrix in coordinates of its smaller side.

    Attributes:
        reduced: `[side, in]`, `error = basis @ reduced`.
        basis: `[out, side]` orthonormal columns, or None.
        tall: `[out, in]` the error itself, where the basis is `tall @ inv(reduced)` and never formed; or None. Without
            either, the coordinates are the outputs themselves.
    """

    reduced: np.ndarray
    basis: np.ndarray | None = None
    tall: np.ndarray | None = None

    @classmethod
    def of(cls, error: np.ndarray) -> ErrorSpace:
        """Coordinates for `error` `[out, in]`."""
        out_features, in_features = error.shape
        if out_features <= in_features:
            return cls(error)
        for precision, factor in ((np.float32, spotrf), (np.float64, dpotrf))[error.dtype != np.float32 :]:
            tall = error.astype(precision, copy=False)
            upper, failed = factor(tall.T @ tall, lower=0, clean=1)
            pivots = np.abs(upper.diagonal())
            if not failed and pivots.max() <= STEEPEST[precision] * pivots.min():
                return cls(upper.astype(np.float64, copy=False), tall=error)
        with one_lapack_thread():
            basis, reduced = qr(error.astype(np.float64), mode="economic")
        return cls(reduced, basis=basis)

    @property
    def side(self) -> int:
        """Size of the eigenproblem, min(out, in)."""
        return len(self.reduced)

    def error(self) -> np.ndarray:
        """The error itself, `[out, in]`."""
        if self.tall is not None:
            return self.tall
        return self.reduced if self.basis is None else self.basis @ self.reduced

    def outputs(self, tokens: np.ndarray) -> np.ndarray:
        """Reduced coordinates `[n, side]` of the error's output on tokens `[n, in]`.

        Those of wide inputs come from bfloat16 where the processor multiplies that: twice as fast, and the rounding
        errors of so many products average out.
        """
        reduced = self.reduced.astype(tokens.dtype, copy=False)
        if tokens.dtype != np.float32 or tokens.shape[1] < LONG_SUM or not multiplies_bfloat16():
            return np.asarray(tokens @ reduced.T)
        narrow = [torch.from_numpy(part).bfloat16() for part in (tokens, reduced)]
        return np.asarray((narrow[0] @ narrow[1].T).float().numpy())

    def covariance(self, gram: np.ndarray) -> np.ndarray:
        """`E G E^T` in reduced coordinates, `[side, side]` float64."""
        left = self.reduced
        gram = gram.astype(left.dtype, copy=False)
        # G is its lower triangle of blocks, with half of those on the diagonal, and the same transposed
        product = np.empty_like(left)
        for start in range(0, len(gram), PANEL):
            own, below = slice(start, start + PANEL), slice(start + PANEL, None)
            product[:, own] = left[:, own] @ gram[own, own] / 2 + left[:, below] @ gram[below, own]
        half = product @ left.T
        return np.asarray(half + half.T, np.float64)

    def lift(self, directions: np.ndarray) -> np.ndarray:
        """Orthonormal directions `[side, r]` as orthonormal columns in output coordinates `[out, r]`, float64."""
        if self.basis is not None:
            lifted: np.ndarray = self.basis @ directions
            return lifted
        if self.tall is None or not directions.shape[1]:
            return np.zeros((len(self.tall), 0)) if self.tall is not None else directions
        inner = solve_triangular(self.reduced, directions).astype(self.tall.dtype)
        with one_lapack_thread():
            columns, mixing = qr((self.tall @ inner).astype(np.float64), mode="economic")
        return np.asarray(columns * np.sign(mixing.diagonal()))

    def coordinates(self, columns: np.ndarray) -> np.ndarray:
        """Inner products `[side, r]` of the basis with columns `[out, r]` in output coordinates."""
        if self.basis is not None:
            inner: np.ndarray = self.basis.T @ columns
            return inner
        if self.tall is None:
            return columns
        products = self.tall.T @ columns.astype(self.tall.dtype)
        return np.asarray(solve_triangular(self.reduced, products, trans="T"))


def top_eigenvectors(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors `[n, rank]` of the largest eigenvalues of a symmetric matrix, largest first."""
    size = len(matrix)
    rank = min(rank, size)
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
    the eigenvectors themselves. Several of them are wanted of many matrices here, and each step costs a product. The
    caller limits the threads of LAPACK.

    Args:
        matrix: `[n, n]` symmetric, float32 or float64; it only has to be multiplied with blocks of columns.
        start: `[n, k]` directions to start from, in any number; random ones fill them up.
        rank: Wanted number of directions.
        steps: Products with the matrix.
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


def whitened_directions(error: np.ndarray, gram: np.ndarray, rank: int) -> np.ndarray:
    """Directions `U` `[out, r]` of the rank-r correction `U U^T E` that is optimal for `||(E - L) X||_F`.

    Args:
        error: `[out, in]`.
        gram: `[in, in]`, `X^T X` up to a factor; may be singular.
        rank: Wanted rank; capped at min(out, in).
    """
    space = ErrorSpace.of(error)
    return space.lift(top_eigenvectors(space.covariance(gram), rank))


def diagonal_directions(error: np.ndarray, weights: np.ndarray, rank: int) -> np.ndarray:
    """Directions `[out, r]` of the best rank-r correction of `E diag(weights)` (plain SVD weighting)."""
    space = ErrorSpace.of(error * weights.astype(error.dtype))
    return space.lift(top_eigenvectors((space.reduced @ space.reduced.T).astype(np.float64), rank))
