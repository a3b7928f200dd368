"""The weight that a layer in the format of AutoGPTQ stands for: slow and plain, code by code."""

from __future__ import annotations

import numpy as np


def decode_layer(tensors: dict[str, np.ndarray], bits: int, version: str) -> np.ndarray:
    """`scales[g] * (code - zero[g])` as `[out, in]` float64, g = g_idx of the input channel.

    Args:
        tensors: `qweight` int32 `[in * bits / 32, out]`, `qzeros` int32 `[groups, out * bits / 32]`, `scales`
            `[groups, out]`, `g_idx` `[in]`.
        bits: Of a code.
        version: "gptq", whose zero points are stored less one, or "gptq_v2".
    """
    scales, g_idx = tensors["scales"].astype(np.float64), tensors["g_idx"]
    in_features, out_features = len(g_idx), scales.shape[1]
    weight = np.empty((out_features, in_features))
    for row in range(out_features):
        column = [int(word) & 0xFFFFFFFF for word in tensors["qweight"][:, row]]
        for channel in range(in_features):
            group = g_idx[channel]
            zero = _field([int(word) & 0xFFFFFFFF for word in tensors["qzeros"][group]], row, bits)
            zero += version == "gptq"
            weight[row, channel] = scales[group, row] * (_field(column, channel, bits) - zero)
    return weight


def _field(words: list[int], place: int, bits: int) -> int:
    """Number `place` of a stream of bits in words of 32, low bits first."""
    start = place * bits
    pair = words[start // 32] | (words[start // 32 + 1] << 32 if start // 32 + 1 < len(words) else 0)
    return (pair >> start % 32) & (2**bits - 1)
