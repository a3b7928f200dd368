"""Best output directions for a low-rank correction, without inverses or damping (specification 5.3).

The optimal rank-r correction of an error `E` under the Gram matrix `G` is `U U^T E`, with `U` the top eigenvectors of
`E G E^T`. When there are more outputs than inputs the same problem is solved in the column space of `E`
(`E = B R`, thin QR), so the eigenproblem always has the smaller side's size and a singular Gram matrix is fine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh, qr

from qe_edge.blas import one_lapack_thread

DOUBLE_LIMIT = 4096 * 4096  # entries of the Gram matrix up to which products are formed in float64


@dataclass(frozen=True)
class ErrorSpace:
    """An error matrix in coordinates of its smaller side.

    Attributes:
        basis: `[out, side]` orthonormal columns, or None when the coordinates are the outputs themselves.
        reduced: `[side, in]`, `error = basis @ reduced`.
    """

    basis: np.ndarray | None
    reduced: np.ndarray

    @classmethod
    def of(cls, error: np.ndarray) -> ErrorSpace:
        """Coordinates for `error` `[out, in]`."""
        out_features, in_features = error.shape
        if out_features <= in_features:
            return cls(None, error)
        with one_lapack_thread():
            basis, reduced = qr(error, mode="economic")
        return cls(basis, reduced)

    @property
    def side(self) -> int:
        """Size of the eigenproblem, min(out, in)."""
        return len(self.reduced)

    def outputs(self, tokens: np.ndarray) -> np.ndarray:
        """Reduced coordinates `[n, side]` of the error's output on tokens `[n, in]`."""
        outputs: np.ndarray = tokens @ self.reduced.T.astype(tokens.dtype)
        return outputs

    def covariance(self, gram: np.ndarray) -> np.ndarray:
        """`E G E^T` in reduced coordinates, `[side, side]` float64."""
        dtype = np.float64 if gram.size <= DOUBLE_LIMIT else np.float32
        left = self.reduced.astype(dtype)
        return np.asarray(left @ gram.astype(dtype) @ left.T, np.float64)

    def lift(self, directions: np.ndarray) -> np.ndarray:
        """Directions `[side, r]` as orthonormal columns in output coordinates `[out, r]`."""
        return directions if self.basis is None else self.basis @ directions


def top_eigenvectors(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors `[n, rank]` of the largest eigenvalues of a symmetric matrix, largest first."""
    size = len(matrix)
    rank = min(rank, size)
    if rank == 0:
        return np.zeros((size, 0))
    symmetric = (matrix + matrix.T) / 2
    with one_lapack_thread():
        if rank == size:
            vectors = eigh(symmetric, driver="evd")[1]
        else:
            vectors = eigh(symmetric, driver="evr", subset_by_index=[size - rank, size - 1])[1]
    flipped: np.ndarray = vectors[:, ::-1]
    return flipped


def whitened_directions(error: np.ndarray, gram: np.ndarray, rank: int) -> np.ndarray:
    """Directions `U` `[out, r]` of the rank-r correction `U U^T E` that is optimal for `||(E - L) X||_F`.

    Args:
        error: `[out, in]` float64.
        gram: `[in, in]`, `X^T X` up to a factor; may be singular.
        rank: Wanted rank; capped at min(out, in).
    """
    space = ErrorSpace.of(error)
    return space.lift(top_eigenvectors(space.covariance(gram), rank))


def diagonal_directions(error: np.ndarray, weights: np.ndarray, rank: int) -> np.ndarray:
    """Directions `[out, r]` of the best rank-r correction of `E diag(weights)` (plain SVD weighting)."""
    space = ErrorSpace.of(error * weights)
    return space.lift(top_eigenvectors(space.reduced @ space.reduced.T, rank))
