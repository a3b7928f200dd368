"""Gram matrices of inputs rounded to INT8: exact sums, and three times as fast as float32 where a CPU multiplies INT8.

Every channel of a chunk is rounded on a symmetric scale of its own. The result is the Gram matrix of the rounded
inputs: positive semidefinite, and the same for any number of threads. Rounding errors average out over inputs, as the
inputs' own fluctuations do. No scale exceeds sqrt(n) / 127 of its channel's root mean square over n inputs. For n =
4096 the variance of the rounding noise is at most 4 % of the sampling variance, as if one input of 25 were missing. It
is less than 0.1 % for products of two normal variables (tested).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qe_edge.system.device import multiplies_int8

LEAST_SIDE = 1024  # of a Gram matrix, from which rounding pays
LONGEST = 1 << 16  # products whose sum stays in int32
PANEL = 640  # rows of a Gram matrix that are computed at a time
CACHED = 1 << 18  # numbers that are rounded at a time
TINY = 1e-30  # channels that never exceed this round to zero


def rounds_gram(side: int) -> bool:
    """Whether a Gram matrix `[side, side]` is computed from rounded inputs here.

    Example:
        >>> rounds_gram(64)  # too small to gain anything, on any processor
        False
    """
    return side >= LEAST_SIDE and multiplies_int8()


def round_channels(x: np.ndarray, largest: np.ndarray) -> tuple[Tensor, Tensor]:
    """Codes int8 of `x` `[n, m]` float32, and their scales float32.

    Args:
        x: Rows or columns are channels.
        largest: Max |x| of every channel, `[n, 1]` or `[m]`.

    Example:
        >>> x = np.array([[1.0, 10.0], [-0.5, 5.0]], np.float32)  # two inputs of two channels
        >>> codes, scales = round_channels(x, largest=np.abs(x).max(0))
        >>> codes.tolist(), (127 * scales).tolist()
        ([[127, 127], [-64, 64]], [1.0, 10.0])
    """
    inverse = np.float32(127) / np.maximum(largest, np.float32(TINY))
    codes = np.empty(x.shape, np.int8)
    size = max(1, CACHED // x.shape[1])
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        piece = x[rows] * (inverse if inverse.ndim == 1 else inverse[rows])
        codes[rows] = np.rint(piece, out=piece)
    return torch.from_numpy(codes), torch.from_numpy(1 / inverse.reshape(-1))


def add_gram(total: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Add `x^T x` to the upper triangle of `total` `[m, m]`, for `x` `[n, m]` as codes and scales `[m]`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(32, 16)
        >>> codes, scales = round_channels(x.numpy(), x.abs().amax(0).numpy())
        >>> gram = torch.zeros(16, 16)
        >>> add_gram(gram, codes, scales)
        >>> bool(torch.allclose(gram.triu(), (x.T @ x).triu(), atol=0.5))
        True
    """
    for first in range(0, len(codes), LONGEST):
        part = codes[first : first + LONGEST]
        for start in range(0, len(scale), PANEL):
            rows, columns = slice(start, start + PANEL), slice(start, None)
            panel = torch._int_mm(part[:, rows].T, part[:, columns])
            total[rows, columns].addcmul_(panel.mul(scale[columns]).to(total.dtype), scale[rows, None].to(total.dtype))
