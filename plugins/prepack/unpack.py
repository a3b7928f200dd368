"""Back from the buffers that the kernels read to the layer that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .floats import from_bits
from .layout import (
    TURN,
    round_up,
    turn_words,
    unpack_down,
    unpack_down4,
    unpack_groups,
    unpack_up,
    unpack_up4,
    unpack_weight,
    unpack_weight3,
)
from .linear import CanonicalLinear
from .pack import PackedLinear, code_unit


@dataclass(frozen=True)
class Form:
    """What the buffers of a layer do not say themselves; as QeProblem of include/qe_edge/plan.h has it."""

    in_features: int
    out_features: int
    act_bits: int
    group_size: int
    has_zeros: int
    has_inv_omega: int
    rank_shared: int
    rank_routed: int
    num_experts: int
    adapter_bits: int
    weight_bits: int

    @classmethod
    def of(cls, linear: CanonicalLinear, packed: PackedLinear) -> Form:
        """Of a layer and what `pack` made of it."""
        return cls(
            in_features=linear.in_features,
            out_features=linear.out_features,
            act_bits=linear.act_bits,
            group_size=linear.group_size,
            has_zeros=int(linear.zeros is not None),
            has_inv_omega=int(linear.inv_omega is not None),
            rank_shared=linear.rank_shared,
            rank_routed=linear.rank_routed,
            num_experts=linear.num_experts,
            adapter_bits=packed.adapter_bits,
            weight_bits=packed.weight_bits,
        )


def unpack(packed: PackedLinear, form: Form) -> CanonicalLinear:
    """The layer, whose ranks are rounded up to what is stored; the rest of them is 0.

    Example:
        >>> from qe_edge.prepack.pack import pack
        >>> linear = CanonicalLinear(np.ones((128, 64), np.int8), scales=np.ones((1, 64), np.float32))
        >>> packed = pack(linear, "f16")
        >>> again = unpack(packed, Form.of(linear, packed))
        >>> bool((again.qweight == linear.qweight).all()), bool((again.scales == linear.scales).all())
        (True, True)
    """
    k, n = form.in_features, form.out_features
    sixteen_bit = form.act_bits == 0
    offset_binary = sixteen_bit or form.has_zeros != 0
    offset = 2 ** (form.weight_bits - 1)
    words = turn_words(packed.weight, -TURN) if offset_binary and not sixteen_bit else packed.weight
    codes = (unpack_weight3 if form.weight_bits == 3 else unpack_weight)(words, sixteen_bit)[:k, :n].astype(np.int16)
    signed = codes - offset if offset_binary else (codes ^ offset) - offset
    factors = packed.columns[:, :n].astype(np.float64)
    units = factors[0] * factors[1] / code_unit(sixteen_bit, offset_binary, form.weight_bits)
    scales = units[None]
    if packed.scales is not None:
        scales = from_bits(unpack_groups(packed.scales), "f16")[: k // form.group_size, :n] * units
    zeros = None
    if packed.zeros is not None and form.has_zeros:
        rows = unpack_groups(packed.zeros)[: len(scales), :n].astype(np.int16)
        zeros = (rows // (8 if form.act_bits else 1) - offset).astype(np.int8)
    omega, router = packed.inv_omega, packed.router
    return CanonicalLinear(
        qweight=signed.astype(np.int8),
        scales=scales.astype(np.float32),
        group_size=form.group_size,
        act_bits=form.act_bits,
        zeros=zeros,
        inv_omega=None if omega is None else from_bits(omega, packed.dtype),
        router=None if router is None else np.ascontiguousarray(from_bits(router, packed.dtype).T),
        bias=packed.columns[2, :n],
        **_factors(packed, form),
    )


def _factors(packed: PackedLinear, form: Form) -> dict[str, Any]:
    """The low-rank correction with its stored ranks."""
    if packed.down is None or packed.up is None:
        return {}
    down: NDArray[Any] = (unpack_down4 if form.adapter_bits == 4 else unpack_down)(packed.down, form.in_features)
    up: NDArray[Any] = (unpack_up4 if form.adapter_bits == 4 else unpack_up)(packed.up)
    routed = form.num_experts > 1 and form.rank_routed > 0
    shared = form.rank_shared if routed else form.rank_shared + form.num_experts * form.rank_routed
    ranks = {
        "rank_shared": round_up(shared, 16),
        "rank_routed": round_up(form.rank_routed, 16) if routed else 0,
        "num_experts": form.num_experts if routed else 0,
    }
    rank, n = ranks["rank_shared"] + ranks["rank_routed"] * ranks["num_experts"], form.out_features
    down, up = down[:, :rank], up[:rank, :n]
    if form.adapter_bits == 16:
        return {**ranks, "down": from_bits(down, packed.dtype), "up": from_bits(up, packed.dtype)}
    scale = None if packed.down_scale is None else packed.down_scale[:rank]
    return {**ranks, "down": down, "up": up, "down_scale": scale, "up_scale": packed.columns[1, :n]}
