"""Orthogonal matrices that are products of small ones: Hadamard-like, and drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix `diag(signs) (left (x) right)`, applied factor by factor.

    Attributes:
        signs: `[size]`, 1 and -1.
        left: `[a, a]` float32 or float64, a size = a b.
        right: `[b, b]`.

    Example:
        >>> rotation = hadamard_like(4)
        >>> rotation(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
        >>> rotation.back(rotation(torch.tensor([1.0, 2.0, 3.0, 4.0])))
        tensor([1.0000, 2.0000, 3.0000, 4.0000])
    """

    signs: Tensor
    left: Tensor
    right: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """`rows` `[..., size]` float32 or float64 times the matrix."""
        signs, left, right = (part.to(rows.dtype) for part in (self.signs, self.left, self.right))
        return _kronecker(rows * signs, left, right)

    def back(self, rows: Tensor) -> Tensor:
        """`rows` `[..., size]` times the transposed matrix: the inverse of `__call__`."""
        signs, left, right = (part.to(rows.dtype) for part in (self.signs, self.left, self.right))
        return _kronecker(rows, left.T, right.T) * signs

    def halved(self) -> Rotation:
        """The same with factors as float16 stores them; it is orthogonal to about 1e-3 then."""
        return replace(self, left=self.left.half().double(), right=self.right.half().double())

    def inverse_transposed(self) -> Rotation:
        """The inverse of the transposed matrix; the matrix itself where it is exactly orthogonal."""
        left, right = (torch.linalg.inv(part).T for part in (self.left, self.right))
        return replace(self, left=left, right=right)

    def matrix(self) -> Tensor:
        """The matrix itself, `[size, size]` float64."""
        return self(torch.eye(len(self.signs), dtype=torch.float64))


def _kronecker(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    a, b = len(left), len(right)
    parts = rows.reshape(-1, b) @ right
    parts = parts.view(-1, a, b).mT.reshape(-1, a) @ left  # as two plain products: batched ones are slow
    return parts.view(-1, b, a).mT.reshape(rows.shape)


def hadamard_like(size: int) -> Rotation:
    """An orthogonal matrix with entries of about the same size.

    Sylvester's Hadamard matrix for the power of two in `size`, times (Kronecker) the discrete Hartley transform for the
    odd rest, whose entries are at most sqrt(2) times the mean. It is exactly Hadamard for powers of two.

    Example:
        >>> hadamard_like(4).matrix()
        tensor([[ 0.5000,  0.5000,  0.5000,  0.5000],
                [ 0.5000, -0.5000,  0.5000, -0.5000],
                [ 0.5000,  0.5000, -0.5000, -0.5000],
                [ 0.5000, -0.5000, -0.5000,  0.5000]], dtype=torch.float64)
        >>> matrix = hadamard_like(12).matrix()
        >>> bool(torch.allclose(matrix @ matrix.T, torch.eye(12, dtype=torch.float64)))
        True
    """
    powers = (size & -size).bit_length() - 1
    odd = size >> powers
    right = min(powers, size.bit_length() // 2)  # two factors of about the same size
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    hartley = (np.cos(angle) + np.sin(angle)) / np.sqrt(odd)
    left = torch.from_numpy(np.kron(hartley, _sylvester(powers - right)))
    return Rotation(torch.ones(size, dtype=torch.float64), left, torch.from_numpy(_sylvester(right)))


def random_rotation(size: int, random: np.random.Generator) -> Rotation:
    """`hadamard_like` with random signs before it: no channel stays alone in any direction.

    Example:
        >>> rotation = random_rotation(768, np.random.default_rng(0))
        >>> outlier = torch.zeros(768)
        >>> outlier[5] = 100.0
        >>> round(float(rotation(outlier).abs().max()), 1)  # its energy is spread over all channels
        3.6
    """
    return replace(hadamard_like(size), signs=torch.from_numpy(random.choice([-1.0, 1.0], size)))


def random_orthogonal(size: int, random: np.random.Generator) -> Rotation:
    """The product (Kronecker) of two orthogonal matrices of about the same size, each drawn uniformly (QuIP).

    Example:
        >>> matrix = random_orthogonal(6, np.random.default_rng(0)).matrix()
        >>> bool(torch.allclose(matrix @ matrix.T, torch.eye(6, dtype=torch.float64)))
        True
    """
    a, b = kronecker_sizes(size)
    left, right = (_uniform(part, random) for part in (a, b))
    return Rotation(torch.ones(size, dtype=torch.float64), left, right)


def kronecker_sizes(size: int) -> tuple[int, int]:
    """The two factors of a number that are nearest to each other, the smaller one first.

    Example:
        >>> kronecker_sizes(576), kronecker_sizes(7)
        ((24, 24), (1, 7))
    """
    small = next(part for part in range(int(size**0.5), 0, -1) if size % part == 0)
    return small, size // small


def _uniform(size: int, random: np.random.Generator) -> Tensor:
    """An orthogonal matrix `[size, size]` float64 drawn uniformly: QR of a normal one, with its signs made even."""
    q, r = np.linalg.qr(random.standard_normal((size, size)))
    return torch.from_numpy(q * np.sign(np.diag(r)))


def _sylvester(power: int) -> np.ndarray:
    """Sylvester's Hadamard matrix `[2^power, 2^power]`, orthogonal."""
    matrix = np.ones((1, 1))
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    return matrix
