"""The two 16-bit types as bit patterns. numpy has no bfloat16, so both are held as uint16."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Dtype = Literal["f16", "bf16"]


def to_bits(values: ArrayLike, dtype: Dtype) -> NDArray[np.uint16]:
    """Round float32 values to the nearest 16-bit value, ties to even.

    Example:
        >>> [hex(bits) for bits in to_bits([1.0, -2.0], "bf16")], [hex(bits) for bits in to_bits([1.0], "f16")]
        (['0x3f80', '0xc000'], ['0x3c00'])
    """
    exact = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return np.asarray(exact.astype(np.float16).view(np.uint16))
    bits = exact.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.asarray(np.where(np.isnan(exact), np.uint32(0x7FFF), rounded).astype(np.uint16))


def from_bits(bits: NDArray[np.uint16], dtype: Dtype) -> NDArray[np.float32]:
    """The float32 values of 16-bit patterns.

    Example:
        >>> from_bits(np.array([0x3C00, 0xC000], np.uint16), "f16")
        array([ 1., -2.], dtype=float32)
    """
    if dtype == "f16":
        return np.asarray(bits.view(np.float16).astype(np.float32))
    return np.asarray((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def rounded(values: ArrayLike, dtype: Dtype) -> NDArray[np.float32]:
    """Float32 values after a round trip through the 16-bit type.

    Example:
        >>> rounded([0.1], "bf16")
        array([0.10009766], dtype=float32)
    """
    return from_bits(to_bits(values, dtype), dtype)
