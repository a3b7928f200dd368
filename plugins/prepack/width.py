"""How many bits packed values take. The one place that decides: the fewest that have kernels and lose nothing."""

from __future__ import annotations

from typing import Literal

from .floats import Dtype
from .linear import CanonicalLinear

LOWEST, HIGHEST = -4, 3  # what 3 bits hold, zero points included
LOWEST_4, HIGHEST_4 = -8, 7


def has_3_bit_kernels(act_bits: int, zeros: bool, dtype: Dtype) -> bool:
    """Whether kernels read 3-bit weights of such a layer; `QeRefuse` in host/plan.cpp says the same.

    What schemes ask for has them: symmetric weights for integer activations, all for 16-bit ones, in float16 models.

    Example:
        >>> has_3_bit_kernels(act_bits=8, zeros=False, dtype="f16"), has_3_bit_kernels(8, True, "f16")
        (True, False)
    """
    return dtype == "f16" and not (act_bits and zeros)


def weight_bits(linear: CanonicalLinear, dtype: Dtype) -> Literal[3, 4]:
    """Bits of every weight of a layer, decided by its values: one code beyond the 3-bit range, and all have 4.

    Example:
        >>> import numpy as np
        >>> small, large = np.full((64, 32), 3, np.int8), np.full((64, 32), 7, np.int8)
        >>> [weight_bits(CanonicalLinear(codes, np.ones((1, 32))), "f16") for codes in (small, large)]
        [3, 4]
    """
    if not has_3_bit_kernels(linear.act_bits, linear.zeros is not None, dtype):
        return 4
    codes = (linear.qweight, linear.zeros)
    fits = all(array is None or (array.min() >= LOWEST and array.max() <= HIGHEST) for array in codes)
    return 3 if fits else 4


def adapter_bits(linear: CanonicalLinear) -> Literal[4, 8, 16]:
    """Bits of every value of both low-rank factors, which have one width: of integers 4 if all codes fit, else 8.

    Example:
        >>> import numpy as np
        >>> adapter_bits(CanonicalLinear(np.zeros((64, 32), np.int8), np.ones((1, 32))))  # without integer factors
        16
    """
    if not linear.coded_adapters:
        return 16
    factors = (linear.down, linear.up)
    fits = all(codes is None or (codes.min() >= LOWEST_4 and codes.max() <= HIGHEST_4) for codes in factors)
    return 4 if fits else 8
