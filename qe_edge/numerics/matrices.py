"""Matrices of one layer: numpy arrays in the CPU's memory, tensors where a device computes. What they do not say alike.

A layer's matrices all lie in one place, so the kind of one tells where the work is done. Nothing goes back and forth
but a few numbers a step, and lists of a few numbers a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Matrix: TypeAlias = Any  # np.ndarray on the CPU, Tensor on a device; no common type has their operators


def beside(values: np.ndarray | Tensor, other: Matrix) -> Matrix:
    """The same numbers, as a matrix of `other`'s layer."""
    if isinstance(other, Tensor):
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        return tensor.to(other.device)
    return values.numpy() if isinstance(values, Tensor) else values


def to_numpy(matrix: Matrix) -> np.ndarray:
    """The same numbers in the CPU's memory."""
    return np.asarray(matrix.cpu() if isinstance(matrix, Tensor) else matrix)


def to_tensor(matrix: Matrix) -> Tensor:
    """The same numbers as a tensor, where they are."""
    return matrix if isinstance(matrix, Tensor) else torch.from_numpy(matrix)


def cast(matrix: Matrix, like: Matrix) -> Matrix:
    """A matrix in the precision of another."""
    return matrix.to(like.dtype) if isinstance(matrix, Tensor) else matrix.astype(like.dtype, copy=False)


def double(matrix: Matrix) -> Matrix:
    """A matrix in float64."""
    return matrix.double() if isinstance(matrix, Tensor) else matrix.astype(np.float64, copy=False)


def joined(parts: Sequence[Matrix], axis: int) -> Matrix:
    """Matrices side by side (axis 1) or below each other (axis 0)."""
    return torch.cat(list(parts), axis) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis=axis)


def parts_of(matrix: Matrix, sizes: Sequence[int], axis: int) -> list[Matrix]:
    """What `joined` put together."""
    if isinstance(matrix, Tensor):
        return list(torch.split(matrix, list(sizes), axis))
    return np.split(matrix, np.cumsum(sizes)[:-1], axis=axis)


def picked(matrix: Matrix, rows: np.ndarray) -> Matrix:
    """Some rows of a matrix, by their numbers or by a mask."""
    return matrix[torch.from_numpy(rows).to(matrix.device)] if isinstance(matrix, Tensor) else matrix[rows]


def energies(matrix: Matrix) -> Matrix:
    """Sum of squares of every row, `[rows]`."""
    return (matrix.square() if isinstance(matrix, Tensor) else np.square(matrix)).sum(1)


def row_products(one: Matrix, other: Matrix) -> Matrix:
    """Inner product of every row with the same row of another matrix, `[rows]`."""
    return (one * other).sum(1) if isinstance(one, Tensor) else np.einsum("nr,nr->n", one, other)


def pseudo_solve(matrix: Matrix, right: Matrix, cutoff: float) -> Matrix:
    """Least-squares solution of `matrix x = right` for a symmetric matrix; singular values below the cutoff count as 0.

    Args:
        matrix: `[n, n]` float64.
        right: `[n, m]` float64.
        cutoff: Relative to the largest singular value.
    """
    if isinstance(matrix, Tensor):
        return torch.linalg.pinv((matrix + matrix.T) / 2, hermitian=True, rtol=cutoff) @ right
    return np.linalg.lstsq(matrix, right, rcond=cutoff)[0]
