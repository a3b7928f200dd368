"""Canonical QELinear tensors to the buffers that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .floats import Dtype, to_bits
from .layout import (
    BLOCK,
    CHUNK,
    TURN,
    pack_down,
    pack_down4,
    pack_groups,
    pack_up,
    pack_up4,
    pack_weight,
    pack_weight3,
    pad_to,
    round_up,
    turn_words,
)
from .linear import CanonicalLinear
from .width import adapter_bits, weight_bits


@dataclass(frozen=True)
class PackedLinear:
    """What one layer passes to the kernels besides x. Tensors that the layer does not need are None.

    Attributes:
        weight_bits: 3 or 4.
        adapter_bits: 16, 8 or 4, of both factors.
        weight: uint8 ``[Np/32, Kp/128, weight_bits, 32, 16]``.
        columns: float32 ``[3, Np]``: factor of the quantized sum, factor of the output, bias.
        scales: float16 patterns ``[Np/32, Kp/g, 8, 4]``, only with groups: in units of a power of two of their column.
        zeros: uint8 ``[Np/32, Kp/g or 1, 8, 4]``: the zero point plus 8, or 4 for 3-bit weights; times 8 for int8
            activations.
        down, up: 16-bit patterns, int8, or uint8 with two values of INT4 in each.
    """

    dtype: Dtype
    weight_bits: int
    adapter_bits: int
    weight: NDArray[np.uint8]
    columns: NDArray[np.float32]
    scales: NDArray[np.uint16] | None
    zeros: NDArray[np.uint8] | None
    inv_omega: NDArray[np.uint16] | None
    down: NDArray[Any] | None
    down_scale: NDArray[np.float32] | None
    up: NDArray[Any] | None
    router: NDArray[np.uint16] | None


def pack(linear: CanonicalLinear, dtype: Dtype) -> PackedLinear:
    """Lay one layer out for the kernels. Raises PackError when the tensors do not fit together.

    Example:
        >>> linear = CanonicalLinear(np.ones((128, 64), np.int8), scales=np.ones((1, 64), np.float32))
        >>> packed = pack(linear, "f16")
        >>> packed.weight_bits, packed.weight.shape, packed.columns.shape
        (3, (2, 1, 3, 32, 16), (3, 64))
    """
    linear.check()
    k, n = linear.in_features, linear.out_features
    kp, np_ = round_up(k, CHUNK), round_up(n, BLOCK)
    sixteen_bit = linear.act_bits == 0
    offset_binary = sixteen_bit or linear.zeros is not None  # codes without sign, and a zero point is subtracted
    bits = weight_bits(linear, dtype)
    offset = 2 ** (bits - 1) if offset_binary else 0

    q = linear.qweight.astype(np.int16)
    codes = pad_to(q + offset & 2**bits - 1, (kp, np_), fill=offset).astype(np.uint8)
    weight = (pack_weight3 if bits == 3 else pack_weight)(codes, sixteen_bit)
    units = _scale_units(linear)
    down, down_scale, up, up_scale = _adapters(linear, dtype, np_)
    return PackedLinear(
        dtype=dtype,
        weight_bits=bits,
        adapter_bits=adapter_bits(linear),
        weight=turn_words(weight, TURN) if offset_binary and not sixteen_bit else weight,
        columns=_columns(linear, up_scale, units * code_unit(sixteen_bit, offset_binary, bits), np_),
        scales=None if linear.group_size < 0 else _scales(linear, units, kp, np_),
        zeros=_zeros(linear, offset, kp, np_) if offset_binary else None,
        inv_omega=None if linear.inv_omega is None else to_bits(linear.inv_omega, dtype),
        down=down,
        down_scale=down_scale,
        up=up,
        router=to_bits(np.asarray(linear.router).T, dtype) if _routed(linear) else None,
    )


def _routed(linear: CanonicalLinear) -> bool:
    return linear.num_experts > 1 and linear.rank_routed > 0


def _zeros(linear: CanonicalLinear, offset: int, kp: int, np_: int) -> NDArray[np.uint8]:
    zeros = np.zeros(linear.scales.shape, np.int8) if linear.zeros is None else linear.zeros
    rows = 1 if linear.group_size < 0 else kp // linear.group_size
    padded = pad_to(zeros.astype(np.int16) + offset, (rows, np_), fill=offset) * (8 if linear.act_bits else 1)
    return pack_groups(padded.astype(np.uint8))


def _scale_units(linear: CanonicalLinear) -> NDArray[np.float64]:
    """The power of two ``[N]`` by which group scales are divided so that the largest of a column is 2^14 to 2^15.

    Then they are float16 numbers whatever the model's type, and the kernels multiply them with subnormal codes.
    """
    largest = np.abs(linear.scales.astype(np.float64)).max(axis=0)
    if linear.group_size < 0:
        return np.ones_like(largest)
    _, exponent = np.frexp(largest)
    return np.asarray(np.where(largest > 0, np.ldexp(1.0, exponent - 15), 1.0))


def _scales(linear: CanonicalLinear, units: NDArray[np.float64], kp: int, np_: int) -> NDArray[np.uint16]:
    scales = (linear.scales / units).astype(np.float32)
    return pack_groups(to_bits(pad_to(scales, (kp // linear.group_size, np_)), "f16"))


def code_unit(sixteen_bit: bool, offset_binary: bool, bits: int) -> float:
    """What the kernels multiply for a code of 1 is 32, 16 or 8 (int8 activations), or the smallest float16 number.

    Example:
        >>> code_unit(sixteen_bit=False, offset_binary=False, bits=4), code_unit(True, True, 4) == 2.0**24
        (0.0625, True)
    """
    if sixteen_bit:
        return 2.0**24
    if bits == 3:
        return 1 / 32
    return 1 / 8 if offset_binary else 1 / 16


def _columns(
    linear: CanonicalLinear, up_scale: NDArray[np.float64], units: NDArray[np.float64], np_: int
) -> NDArray[np.float32]:
    """The sum is multiplied by row 0 before the low-rank part joins it, and both by row 1 after."""
    n = linear.out_features
    main = np.ones(n) if linear.group_size > 0 else linear.scales[0].astype(np.float64)
    columns = np.zeros((3, np_), np.float32)
    columns[0, :n] = main / up_scale * units
    columns[1, :n] = up_scale
    columns[2, :n] = 0 if linear.bias is None else linear.bias
    return columns


def _segments(linear: CanonicalLinear) -> list[tuple[int, int]]:
    """Column ranges of `down` that become tiles: the shared expert, then each routed one."""
    shared = linear.rank_shared
    if not _routed(linear):
        return [(0, linear.rank)]
    starts = [shared + e * linear.rank_routed for e in range(linear.num_experts)]
    return [(0, shared)] + [(start, start + linear.rank_routed) for start in starts]


def _adapters(
    linear: CanonicalLinear, dtype: Dtype, np_: int
) -> tuple[NDArray[Any] | None, NDArray[np.float32] | None, NDArray[Any] | None, NDArray[np.float64]]:
    """Packed down, its scales, packed up, and the scale of every output column (never zero)."""
    n = linear.out_features
    if linear.down is None or linear.up is None:
        return None, None, None, np.ones(n)
    down_scale, up, up_scale = np.ones(linear.rank), linear.up, np.ones(n)
    if linear.coded_adapters and linear.down_scale is not None and linear.up_scale is not None:
        down_scale = linear.down_scale.astype(np.float64)
        usable = linear.up_scale != 0
        up_scale = np.where(usable, linear.up_scale, 1.0).astype(np.float64)
        up = np.where(usable, up, 0).astype(np.int8)
    pieces, rows, scales = [], [], []
    for start, stop in _segments(linear):
        width = round_up(stop - start, 16)
        pieces.append(pad_to(linear.down[:, start:stop], (linear.in_features, width)))
        rows.append(pad_to(up[start:stop], (width, np_)))
        scales.append(pad_to(down_scale[start:stop], (width,)))
    wide_down, tall_up = np.concatenate(pieces, 1), np.concatenate(rows, 0)
    wide_scale, bits = np.concatenate(scales).astype(np.float32), adapter_bits(linear)
    if bits == 4:
        return pack_down4(wide_down), wide_scale, pack_up4(tall_up), up_scale
    if bits == 16:
        wide_down, tall_up = to_bits(wide_down, dtype), to_bits(tall_up, dtype)
    return pack_down(wide_down), wide_scale, pack_up(tall_up), up_scale
