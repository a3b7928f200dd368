"""The operator in float64, slow and obvious. Every kernel test compares with it.

The quantized activations are integers that the contract fixes (float32 scale, round half to even), so they are
computed in float32; all sums are exact or float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .floats import Dtype, rounded
from .linear import CanonicalLinear

Values = NDArray[np.float64]


def quantize_tokens(x: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per-token symmetric quantization (docs/method.md, section 3): integers ``[M, K]``, scales ``[M]``, both float32.

    Example:
        >>> codes, scale = quantize_tokens(np.array([[127.0, -63.6]], np.float32), bits=8)
        >>> codes, scale
        (array([[127., -64.]], dtype=float32), array([1.], dtype=float32))
    """
    top = np.float32(2 ** (bits - 1) - 1)
    scale = np.maximum(np.abs(x).max(axis=1), np.float32(1e-5)) / top
    return np.clip(np.rint(x / scale[:, None]), -top - 1, top), scale


def dequantize_weight(linear: CanonicalLinear) -> Values:
    """``(q - zero) * scale`` as ``[K, N]``.

    Example:
        >>> scales = np.array([[0.5, 2.0]], np.float32)
        >>> dequantize_weight(CanonicalLinear(np.array([[1, -2], [3, 4]], np.int8), scales))
        array([[ 0.5, -4. ],
               [ 1.5,  8. ]])
    """
    repeat = linear.in_features if linear.group_size < 0 else linear.group_size
    zero = np.zeros_like(linear.scales) if linear.zeros is None else linear.zeros
    centred = linear.qweight.astype(np.float64) - np.repeat(zero.astype(np.float64), repeat, axis=0)
    return np.asarray(centred * np.repeat(linear.scales.astype(np.float64), repeat, axis=0))


def choose_experts(linear: CanonicalLinear, x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Argmin of ``|x| @ router``; ties go to the lowest index, a token with a non-finite score to expert 0.

    Example:
        >>> weight, router = np.zeros((2, 4), np.int8), np.array([[1.0, 0.0], [0.0, 1.0]])
        >>> linear = CanonicalLinear(weight, np.ones((1, 4)), router=router, num_experts=2)
        >>> choose_experts(linear, np.array([[5.0, 1.0], [1.0, 5.0]], np.float32))
        array([1, 0])
    """
    if linear.num_experts < 2 or linear.router is None:
        return np.zeros(len(x), np.int64)
    scores = np.abs(x).astype(np.float64) @ linear.router.astype(np.float64)
    return np.where(np.isfinite(scores).all(axis=1), scores.argmin(axis=1), 0)


def low_rank(linear: CanonicalLinear, x: NDArray[np.float32]) -> Values:
    """``((x @ down) * mask) @ up``: the shared columns always, the routed ones of each token's expert.

    Example:
        >>> down, up = np.array([[1.0], [1.0]], np.float32), np.array([[1.0, 2.0]], np.float32)
        >>> linear = CanonicalLinear(np.zeros((2, 2), np.int8), np.ones((1, 2)), down=down, up=up, rank_shared=1)
        >>> low_rank(linear, np.array([[3.0, 4.0]], np.float32))
        array([[ 7., 14.]])
    """
    if linear.down is None or linear.up is None:
        return np.zeros((len(x), linear.out_features))
    down, up = linear.down.astype(np.float64), linear.up.astype(np.float64)
    if linear.down_scale is not None and linear.up_scale is not None:
        down, up = down * linear.down_scale, up * linear.up_scale
    expert = choose_experts(linear, x)
    owner = np.full(linear.rank, -1)
    owner[linear.rank_shared :] = np.arange(linear.rank - linear.rank_shared) // max(1, linear.rank_routed)
    mask = (owner[None, :] == -1) | (owner[None, :] == expert[:, None])
    return np.asarray(((x.astype(np.float64) @ down) * mask) @ up)


def qe_linear(linear: CanonicalLinear, x: NDArray[np.float32], dtype: Dtype) -> Values:
    """Y ``[M, N]`` in float64, without the final rounding to the 16-bit type.

    Example:
        >>> linear = CanonicalLinear(np.array([[1, 2], [3, 4]], np.int8), np.ones((1, 2), np.float32), act_bits=0)
        >>> qe_linear(linear, np.array([[1.0, 10.0]], np.float32), "f16")
        array([[31., 42.]])
    """
    scaled = x if linear.inv_omega is None else np.asarray(x * linear.inv_omega, np.float32)
    weight = dequantize_weight(linear)
    if linear.act_bits:
        q, scale = quantize_tokens(scaled, linear.act_bits)
        main = (q.astype(np.float64) @ weight) * scale[:, None].astype(np.float64)
    else:
        main = rounded(scaled, dtype).astype(np.float64) @ weight
    bias = 0.0 if linear.bias is None else linear.bias.astype(np.float64)
    return np.asarray(main + low_rank(linear, x) + bias)
