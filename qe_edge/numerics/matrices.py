"""Matrices of one layer: numpy arrays in the CPU's memory, tensors on a device. Functions that work for both.

A layer's matrices all lie in one place, so the kind of one of them tells where the work is done. Only a few numbers a
step, and lists of a few numbers a token, go back and forth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Matrix: TypeAlias = Any  # np.ndarray on the CPU, Tensor on a device; no common type has their operators


def beside(values: np.ndarray | Tensor, other: Matrix) -> Matrix:
    """The same numbers as an array or a tensor, whichever `other` is, and on its device.

    Example:
        >>> beside(np.ones(2), torch.zeros(1)), beside(torch.ones(2), np.zeros(1))
        (tensor([1., 1.], dtype=torch.float64), array([1., 1.], dtype=float32))
    """
    if isinstance(other, Tensor):
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        return tensor.to(other.device)
    return values.numpy() if isinstance(values, Tensor) else values


def to_numpy(matrix: Matrix) -> np.ndarray:
    """The same numbers in the CPU's memory.

    Example:
        >>> to_numpy(torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return np.asarray(matrix.cpu() if isinstance(matrix, Tensor) else matrix)


def to_tensor(matrix: Matrix) -> Tensor:
    """The same numbers as a tensor, without a copy.

    Example:
        >>> to_tensor(np.arange(3))
        tensor([0, 1, 2])
    """
    return matrix if isinstance(matrix, Tensor) else torch.from_numpy(matrix)


def cast(matrix: Matrix, like: Matrix) -> Matrix:
    """A matrix in the precision of another.

    Example:
        >>> cast(torch.ones(2), torch.zeros(2, dtype=torch.float64)).dtype
        torch.float64
        >>> cast(np.ones(2), np.zeros(2, np.float32)).dtype
        dtype('float32')
    """
    return matrix.to(like.dtype) if isinstance(matrix, Tensor) else matrix.astype(like.dtype, copy=False)


def double(matrix: Matrix) -> Matrix:
    """A matrix in float64.

    Example:
        >>> double(torch.ones(2)).dtype, double(np.ones(2, np.float32)).dtype
        (torch.float64, dtype('float64'))
    """
    return matrix.double() if isinstance(matrix, Tensor) else matrix.astype(np.float64, copy=False)


def joined(parts: Sequence[Matrix], axis: int) -> Matrix:
    """Matrices side by side (axis 1) or below each other (axis 0).

    Example:
        >>> joined([np.zeros((2, 1)), np.ones((2, 2))], axis=1).tolist()
        [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    """
    return torch.cat(list(parts), axis) if isinstance(parts[0], Tensor) else np.concatenate(parts, axis=axis)


def parts_of(matrix: Matrix, sizes: Sequence[int], axis: int) -> list[Matrix]:
    """Cut a matrix into parts of `sizes` columns (axis 1) or rows (axis 0): the inverse of `joined`.

    Example:
        >>> [part.tolist() for part in parts_of(np.arange(5), [2, 3], axis=0)]
        [[0, 1], [2, 3, 4]]
    """
    if isinstance(matrix, Tensor):
        return list(torch.split(matrix, list(sizes), axis))
    return np.split(matrix, np.cumsum(sizes)[:-1], axis=axis)


def picked(matrix: Matrix, rows: np.ndarray) -> Matrix:
    """Some rows of a matrix, by their numbers or by a mask.

    Example:
        >>> picked(torch.eye(3), np.array([True, False, True])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return matrix[torch.from_numpy(rows).to(matrix.device)] if isinstance(matrix, Tensor) else matrix[rows]


def energies(matrix: Matrix) -> Matrix:
    """Sum of squares of every row, `[rows]`.

    Example:
        >>> energies(np.array([[3.0, 4.0], [1.0, 1.0]])).tolist()
        [25.0, 2.0]
    """
    return (matrix.square() if isinstance(matrix, Tensor) else np.square(matrix)).sum(1)


def row_products(one: Matrix, other: Matrix) -> Matrix:
    """Inner product of every row with the same row of another matrix, `[rows]`.

    Example:
        >>> row_products(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[5.0, 6.0], [1.0, 0.0]])).tolist()
        [17.0, 3.0]
    """
    return (one * other).sum(1) if isinstance(one, Tensor) else np.einsum("nr,nr->n", one, other)


def pseudo_solve(matrix: Matrix, right: Matrix, cutoff: float) -> Matrix:
    """Least-squares solution of `matrix x = right` for a symmetric matrix; singular values below the cutoff count as 0.

    Args:
        matrix: `[n, n]` float64.
        right: `[n, m]` float64.
        cutoff: Relative to the largest singular value.

    Example:
        >>> singular = np.array([[2.0, 0.0], [0.0, 0.0]])
        >>> pseudo_solve(singular, np.array([[6.0], [1.0]]), cutoff=1e-10).tolist()
        [[3.0], [0.0]]
    """
    if isinstance(matrix, Tensor):
        return torch.linalg.pinv((matrix + matrix.T) / 2, hermitian=True, rtol=cutoff) @ right
    return np.linalg.lstsq(matrix, right, rcond=cutoff)[0]
