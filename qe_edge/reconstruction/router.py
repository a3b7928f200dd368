"""Router initialisation: scores on |x| that predict every expert's residual (docs/method.md, section 7)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve, get_blas_funcs
from torch import Tensor

from qe_edge.numerics.int8_products import add_gram, round_channels, rounds_gram
from qe_edge.numerics.matrices import Matrix, cast, double, energies, joined, parts_of, picked, row_products, to_numpy
from qe_edge.reconstruction.directions import ErrorSpace

RIDGE = 1e-2  # damping relative to the mean diagonal of |X||X|^T
LARGEST = float(np.finfo(np.float16).max)  # entry of a router
SPREAD_TOKENS = 1024  # tokens whose scores give the factor that scales a router
DUAL_TOKENS = 4096  # tokens of the regression in a layer with more inputs than this


def triangle_router(error: Matrix, corrections: Iterable[Matrix]) -> Matrix:
    """`R_ic = mean_o |E_S - L_i|_oc`: an upper bound of the mean absolute residual of expert i, free of data.

    Args:
        error: `[out, in]` that the shared expert left.
        corrections: The correction `[out, in]` of every expert, one at a time: each is as large as the error.

    Returns:
        `[experts, in]` float64.

    Example:
        >>> error, corrections = np.eye(2), [np.diag([1.0, 0.0]), np.diag([0.0, 1.0])]
        >>> triangle_router(error, corrections)  # expert i leaves nothing of input i
        array([[0. , 0.5],
               [0.5, 0. ]])
    """
    rows = [abs(error - correction).mean(0) for correction in corrections]
    return torch.stack(rows) if isinstance(error, Tensor) else np.stack(rows)


class RidgeRegression:
    """Ridge regression from |x| to the centred residuals of experts; factored once, for any number of sets of experts.

    Args:
        tokens: `[n, in]` calibration tokens; of a wide layer `DUAL_TOKENS` evenly spread ones are used.

    Example:
        >>> random = np.random.default_rng(0)
        >>> tokens = random.standard_normal((1000, 8)).astype(np.float32)
        >>> residuals = abs(tokens[:, :2])  # expert i leaves input i
        >>> router = RidgeRegression(tokens).router(residuals)
        >>> picked_experts = (abs(tokens) @ router.T).argmin(1)
        >>> bool((picked_experts == residuals.argmin(1)).mean() > 0.95)
        True
    """

    def __init__(self, tokens: Matrix) -> None:
        in_features = tokens.shape[1]
        self._rows = np.arange(len(tokens))
        if len(tokens) > DUAL_TOKENS and in_features > DUAL_TOKENS:
            self._rows = np.linspace(0, len(tokens) - 1, DUAL_TOKENS).astype(np.int64)
            tokens = picked(tokens, self._rows)
        self._magnitude = abs(tokens)
        self._dual = len(tokens) < in_features
        self._lower: Tensor | None = None
        if isinstance(tokens, Tensor):
            self._factor_there(self._magnitude, in_features)
            return
        normal = _lower_gram(self._magnitude, transposed=self._dual)
        damping = RIDGE * np.trace(normal) / in_features
        self._empty = damping <= 0
        normal[np.diag_indices_from(normal)] += damping if damping > 0 else 1.0
        self._factor = cho_factor(normal, lower=True, overwrite_a=True, check_finite=False)

    def _factor_there(self, magnitude: Tensor, in_features: int) -> None:
        """The factor on a device."""
        normal = magnitude @ magnitude.T if self._dual else magnitude.T @ magnitude
        diagonal = normal.diagonal()
        damping = RIDGE * float(diagonal.sum()) / in_features
        self._empty = damping <= 0
        diagonal += damping if damping > 0 else 1.0
        self._lower = torch.linalg.cholesky(normal)

    def router(self, residuals: Matrix) -> Matrix:
        """Router `[experts, in]` float64 for the norms of every expert's residual on every token `[n, experts]`."""
        if self._lower is not None:
            return self._router_there(residuals, self._lower)
        if self._empty:
            return np.zeros((residuals.shape[1], self._magnitude.shape[1]))
        centred = residuals[self._rows]
        centred = centred - centred.mean(1, keepdims=True)
        if self._dual:
            solved = cho_solve(self._factor, centred).T.astype(self._magnitude.dtype)
            return np.asarray(solved @ self._magnitude, np.float64)
        weights: np.ndarray = cho_solve(self._factor, self._magnitude.T @ centred.astype(self._magnitude.dtype)).T
        return weights

    def _router_there(self, residuals: Tensor, lower: Tensor) -> Tensor:
        """The router on a device."""
        if self._empty:
            return residuals.new_zeros(residuals.shape[1], self._magnitude.shape[1], dtype=torch.float64)
        centred = picked(residuals, self._rows)
        centred = cast(centred - centred.mean(1, keepdim=True), self._magnitude)
        if self._dual:
            weights: Tensor = torch.cholesky_solve(centred, lower).T @ self._magnitude
            return weights.double()
        return torch.cholesky_solve(self._magnitude.T @ centred, lower).T.double()


def _lower_gram(x: np.ndarray, *, transposed: bool) -> np.ndarray:
    """The lower triangle of `x^T x`, or of `x x^T`; rounding is far more precise than the damping is large."""
    side = x.shape[not transposed]
    if x.dtype == np.float32 and rounds_gram(side):
        codes, scale = round_channels(x, x.max(1, keepdims=True) if transposed else x.max(0))
        upper = torch.zeros(side, side)
        add_gram(upper, codes.T if transposed else codes, scale)
        return np.asarray(upper.numpy().T)
    (syrk,) = get_blas_funcs(("syrk",), (x,))
    lower: np.ndarray = syrk(1.0, x.T, trans=transposed, lower=1)
    return lower


def ridge_router(tokens: Matrix, residuals: Matrix) -> Matrix:
    """Ridge regression from |x| `[n, in]` to the centred residual norms `[n, experts]`; `[experts, in]` float64.

    Example:
        >>> random = np.random.default_rng(0)
        >>> tokens = random.standard_normal((1000, 8)).astype(np.float32)
        >>> ridge_router(tokens, residuals=abs(tokens[:, :3])).shape
        (3, 8)
    """
    return RidgeRegression(tokens).router(residuals)


def routed_residuals(
    space: ErrorSpace, tokens: Matrix, outputs: Matrix, ups: Sequence[Matrix], downs: Sequence[Matrix]
) -> Matrix:
    """Norm of the error that every routed expert leaves on every token, `||E x - up_s down_s x - up_i down_i x||`.

    Args:
        space: Space of the error `E` `[out, in]`.
        tokens: `[n, in]`.
        outputs: `[n, side]` the error's output on the tokens, in that space.
        ups: `[out, rank]` of the shared expert (first; any rank) and of every routed one.
        downs: `[rank, in]` likewise.

    Returns:
        `[n, experts]`, without the shared expert.

    Example:
        >>> error, tokens = np.eye(2), np.array([[3.0, 4.0]])
        >>> none, first, second = np.zeros((2, 0)), np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])
        >>> ups, downs = [none, first, second], [none.T, first.T, second.T]
        >>> routed_residuals(ErrorSpace.of(error), tokens, tokens @ error.T, ups, downs)
        array([[4., 3.]])
    """
    together = double(tokens @ cast(joined(downs, 0).T, tokens))
    hidden = parts_of(together, [len(down) for down in downs], 1)
    along = [double(outputs @ cast(space.coordinates(up), outputs)) for up in ups]
    shared, inner = hidden[0], [ups[0].T @ up for up in ups]
    left = energies(outputs) + row_products(shared, shared @ inner[0] - 2 * along[0])
    columns = []
    for expert in range(1, len(ups)):
        own = hidden[expert]
        energy = own @ (ups[expert].T @ ups[expert]) - 2 * (along[expert] - shared @ inner[expert])
        columns.append((left + row_products(own, energy))[:, None])
    return joined(columns, 1).clip(0.0) ** 0.5


def normalise_router(router: Matrix, tokens: Matrix) -> np.ndarray:
    """Scale all scores by one factor so that they spread by about 1 over the experts. The argmin stays the same.

    The factor is smaller for experts that are nearly alike, so that the router fits float16.

    Example:
        >>> router, tokens = np.array([[400.0, 0.0], [0.0, 400.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> normalise_router(router, tokens)
        array([[2., 0.],
               [0., 2.]])
    """
    router, tokens = to_numpy(router), to_numpy(tokens[:: max(1, len(tokens) // SPREAD_TOKENS)])
    spread = (np.abs(tokens) @ router.T).std(1).mean() if len(tokens) else 0.0
    divisor = max(spread, float(np.abs(router).max(initial=0.0)) / LARGEST)
    scaled: np.ndarray = router / divisor if divisor > 0 else router
    return scaled
