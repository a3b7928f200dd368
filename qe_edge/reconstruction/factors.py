"""Low-rank factors as they are stored: one is rounded, and the other refitted to it (docs/method.md, section 5.4).

Correction `i` is `up_i @ down_i` with orthonormal `up_i`. The up factors of all experts are rounded together first
(int8 has one scale per output channel across all of them); then every down factor is the least-squares fit to
the rounded up factor, `down = pinv(up) E`, which is optimal under any Gram matrix of full rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qe_edge.numerics.grids import quantize_int8
from qe_edge.numerics.matrices import Matrix, beside, cast, double, joined, parts_of, pseudo_solve

AdapterDtype = Literal["int4", "int8", "float16", "float32"]
FACTOR_BITS: dict[AdapterDtype, int] = {"int4": 4, "int8": 8, "float16": 16, "float32": 32}
_FLOAT = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StoredFactor:
    """A factor matrix in storage precision.

    Attributes:
        codes: int8 codes or float values, `[rows, columns]`.
        scale: float16 `[rows]` for int8 codes, else None.

    Example:
        >>> store_factor(np.array([[127.0, 2.0]]), "int8").values()
        tensor([[127.,   2.]], dtype=torch.float64)
    """

    codes: Tensor
    scale: Tensor | None

    def values(self) -> Tensor:
        """The values that inference uses, float64."""
        values = self.codes.double()
        return values if self.scale is None else values * self.scale.double().unsqueeze(1)

    def real(self) -> np.ndarray:
        """`values` in the CPU's memory."""
        return self.values().cpu().numpy()


def store_factor(matrix: Matrix, dtype: AdapterDtype) -> StoredFactor:
    """Round a factor `[rows, columns]` to storage precision; int8 gets one scale per row.

    Example:
        >>> store_factor(np.array([[127.0, 2.0], [1.27, 0.5]]), "int8").codes
        tensor([[127,   2],
                [127,  50]], dtype=torch.int8)
    """
    if isinstance(matrix, Tensor):
        tensor = matrix.float().contiguous()
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
    if dtype == "int8":
        return StoredFactor(*quantize_int8(tensor, 0))
    return StoredFactor(tensor.to(_FLOAT[dtype]), None)


def store_up_factors(parts: list[Matrix], dtype: AdapterDtype) -> tuple[StoredFactor, list[Matrix]]:
    """Round the up factors `[out, rank_i]` of all experts side by side.

    Returns:
        The stored concatenation `[out, sum of ranks]`, and the rounded part of every expert, float64.

    Example:
        >>> shared, routed = np.array([[1.0], [0.0]]), np.array([[0.0, 0.6], [1.0, 0.8]])
        >>> stored, parts = store_up_factors([shared, routed], "int8")
        >>> tuple(stored.codes.shape), [part.shape for part in parts]
        ((2, 3), [(2, 1), (2, 2)])
    """
    stored = store_factor(joined(parts, 1), dtype)
    return stored, parts_of(beside(stored.values(), parts[0]), [part.shape[1] for part in parts], 1)


def fit_down_factor(up: Matrix, error: Matrix) -> Matrix:
    """The down factor `[rank, in]` that fits `error` `[out, in]` best for a given up factor `[out, rank]`.

    Example:
        >>> fit_down_factor(np.array([[2.0], [0.0]]), np.array([[6.0, 8.0], [1.0, 1.0]]))
        array([[3., 4.]])
    """
    return _solve(up, cast(up.T, error) @ error)


def store_down_factors(ups: Sequence[Matrix], error: Matrix, dtype: AdapterDtype) -> list[StoredFactor]:
    """Down factors of all experts, each fitted to its rounded up factor.

    Args:
        ups: `[out, rank]` of the shared expert (first; rank 0 for none), which is fitted to the error, and of every
            routed expert, which is fitted to the error that the stored shared expert leaves.
        error: `[out, in]`.
        dtype: Storage.

    Example:
        >>> shared, routed = np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])
        >>> stored = store_down_factors([shared, routed], np.array([[6.0, 8.0], [1.0, 2.0]]), "float32")
        >>> [factor.codes.tolist() for factor in stored]
        [[[6.0, 8.0]], [[1.0, 2.0]]]
    """
    products = parts_of(cast(joined(ups, 1).T, error) @ error, [up.shape[1] for up in ups], 0)
    stored = [store_factor(_solve(ups[0], products[0]), dtype)]
    shared = beside(stored[0].values(), error)
    for up, product in zip(ups[1:], products[1:], strict=True):
        stored.append(store_factor(_solve(up, double(product) - (up.T @ ups[0]) @ shared), dtype))
    return stored


def _solve(up: Matrix, products: Matrix) -> Matrix:
    """Least-squares `[rank, in]` from the products `up^T error`."""
    return pseudo_solve(up.T @ up, double(products), 1e-12)


def join_down_factors(parts: list[StoredFactor]) -> StoredFactor:
    """Down factors of all experts below each other, `[sum of ranks, in]`.

    Example:
        >>> parts = [store_factor(np.ones((rank, 8)), "int8") for rank in (4, 2)]
        >>> tuple(join_down_factors(parts).codes.shape)
        (6, 8)
    """
    codes = torch.cat([part.codes for part in parts])
    scales = [part.scale for part in parts if part.scale is not None]
    return StoredFactor(codes, torch.cat(scales) if scales else None)
