"""Bits of a quantized layer that does not exist yet, counted by the same code as real ones on the meta device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qe_edge.budget.accounting import BitCount, add_counts, layer_counts
from qe_edge.budget.model import AdapterSize
from qe_edge.layers.linear import Adapters, QELinear, QuantizedLinear
from qe_edge.numerics.grids import PER_CHANNEL, QuantizedWeight
from qe_edge.numerics.schemes import Scheme


def empty_linear(
    out_features: int, in_features: int, scheme: Scheme, size: AdapterSize, *, scaled: bool = False
) -> QuantizedLinear:
    """A quantized layer without data.

    Args:
        out_features: Output channels.
        in_features: Input channels.
        scheme: Number grids.
        size: Its low-rank correction.
        scaled: Whether its main branch has a factor per input channel.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> linear = empty_linear(768, 3072, get_scheme("w4a8"), AdapterSize(rank_shared=32, factor_bits=8))
        >>> tuple(linear.adapters.down.shape), linear.adapters.down.device
        ((32, 3072), device(type='meta'))
    """

    def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, columns) if columns else (rows,), dtype=dtype, device="meta")

    group = scheme.weight.resolve_group(in_features)
    groups = 1 if group == PER_CHANNEL else in_features // group
    zeros = None if scheme.weight.symmetric else empty(out_features, groups, torch.int8)
    scales = empty(out_features, groups, torch.float16)
    weight = QuantizedWeight(empty(out_features, in_features, torch.int8), scales, zeros, scheme.weight.bits, group)
    inv_omega = empty(in_features, 0, torch.float16) if scaled else None
    experts = size.experts if size.experts > 1 else 0
    rank = size.rank_shared + experts * size.rank_routed
    if not rank:
        return QuantizedLinear(weight, scheme.activation_bits, inv_omega)
    dtype = {4: torch.uint8, 8: torch.int8, 16: torch.float16, 32: torch.float32}[size.factor_bits]
    entries = 2 if size.factor_bits == 4 else 1  # of a row in one element
    integers = size.factor_bits <= 8
    adapters = Adapters(
        down=empty(rank, -(-in_features // entries), dtype),
        up=empty(out_features, -(-rank // entries), dtype),
        down_scale=empty(rank, 0, torch.float16) if integers else None,
        up_scale=empty(out_features, 0, torch.float16) if integers else None,
        rank_shared=size.rank_shared,
        rank_routed=size.rank_routed if experts else 0,
        num_experts=experts,
        router=empty(experts, in_features, torch.float16) if experts else None,
    )
    return QuantizedLinear(weight, scheme.activation_bits, inv_omega, adapters)


@lru_cache(maxsize=4096)
def predicted_bits(
    out_features: int, in_features: int, scheme: Scheme, size: AdapterSize, *, scaled: bool = False
) -> BitCount:
    """Bits of a layer `[out, in]`, its siblings stacked. `empty_linear` describes the arguments.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> scheme = get_scheme("w4a8")
        >>> plain = predicted_bits(768, 3072, scheme, AdapterSize())
        >>> corrected = predicted_bits(768, 3072, scheme, AdapterSize(rank_shared=32, factor_bits=8))
        >>> round(plain.stored_bits, 3), round(corrected.stored_bits, 3)
        (4.005, 4.427)
    """
    linear = empty_linear(out_features, in_features, scheme, size, scaled=scaled)
    return add_counts(layer_counts({"layer": QELinear(linear)}).values())
