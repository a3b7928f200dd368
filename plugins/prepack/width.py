"""How many bits a packed weight takes. The one place that decides: 3 where its kernel is there and nothing is lost."""

from __future__ import annotations

from typing import Literal

from .floats import Dtype
from .linear import CanonicalLinear

LOWEST, HIGHEST = -4, 3  # what 3 bits hold, zero points included


def has_3_bit_kernels(act_bits: int, zeros: bool, dtype: Dtype) -> bool:
    """Whether kernels read 3-bit weights of such a layer; `QeRefuse` in host/plan.cpp says the same.

    What schemes ask for has them: symmetric weights for integer activations, all for 16-bit ones, in float16 models.
    """
    return dtype == "f16" and not (act_bits and zeros)


def weight_bits(linear: CanonicalLinear, dtype: Dtype) -> Literal[3, 4]:
    """Bits of every weight of a layer, decided by its values: one code beyond the 3-bit range, and all have 4."""
    if not has_3_bit_kernels(linear.act_bits, linear.zeros is not None, dtype):
        return 4
    codes = (linear.qweight, linear.zeros)
    fits = all(array is None or (array.min() >= LOWEST and array.max() <= HIGHEST) for array in codes)
    return 3 if fits else 4
