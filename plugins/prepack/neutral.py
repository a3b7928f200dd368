"""Undo what the exporter adds so that all layers of a graph can share one ONNX function.

A layer that lacks an operand gets a neutral one there: a factor of 1, a zero point or bias of 0, a correction of rank 1
that is 0, a router of one expert, a group as long as the row. The plugin need not pay for any of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def without_neutral(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a CanonicalLinear, less those that change nothing.

    Example:
        >>> fields = {"qweight": np.ones((64, 32), np.int8), "scales": np.ones((1, 32)), "bias": np.zeros(32)}
        >>> numbers = {"group_size": 64, "rank_shared": 0, "rank_routed": 0, "num_experts": 0}
        >>> kept = without_neutral({**fields, **numbers})
        >>> sorted(kept.keys() & fields.keys()), kept["group_size"]
        (['qweight', 'scales'], -1)
    """
    kept = dict(fields)
    if kept["group_size"] == len(kept["qweight"]) and len(kept["scales"]) == 1:
        kept["group_size"] = -1
    for name, neutral in (("zeros", 0), ("bias", 0), ("inv_omega", 1)):
        if name in kept and bool((kept[name] == neutral).all()):
            del kept[name]
    if "down" in kept and not (np.any(kept["down"]) and np.any(kept["up"])):
        for name in ("down", "up", "down_scale", "up_scale", "router"):
            kept.pop(name, None)
        kept |= {"rank_shared": 0, "rank_routed": 0, "num_experts": 0}
    if kept["num_experts"] < 2 or kept["rank_routed"] == 0:
        kept.pop("router", None)
        kept["rank_shared"] += kept["num_experts"] * kept["rank_routed"]
        kept |= {"rank_routed": 0, "num_experts": 0}
    return _fold_scales(kept)


def _fold_scales(fields: dict[str, Any]) -> dict[str, Any]:
    """Only factors of integers keep scales of their own."""
    if "down" not in fields or (fields["down"].dtype == np.int8 and fields["up"].dtype == np.int8):
        return fields
    for factor in ("down", "up"):
        scale = fields.pop(f"{factor}_scale", None)
        fields[factor] = fields[factor].astype(np.float32) * (1 if scale is None else scale)
    return fields
