"""What the kit times: layers of two models, numbers of tokens, and ways to quantize."""

from __future__ import annotations

from dataclasses import dataclass

MODELS = {
    "Qwen2-VL-2B": [(1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536)],
    "Qwen2-VL-7B": [(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)],
}
"""in_features and out_features of a block's merged linears: q/k/v, o, gate/up, down."""

BLOCKS = 28  # of both models
TOKENS: tuple[int, ...] = (1, 1024, 64, 8, 16, 256, 4, 4096)
"""In the order of their use: when the time is up, what is left out is left out of every layer."""

STEP_TOKENS: tuple[int, ...] = (1, 1024)
MOST_COPIES = 128


@dataclass(frozen=True)
class Way:
    """One way to quantize a layer, as the problem of a plan counts it."""

    name: str
    act_bits: int = 8
    group_size: int = -1
    zeros: bool = False
    weight_bits: int = 4
    rank_shared: int = 0
    rank_routed: int = 0
    experts: int = 0
    adapter_bits: int = 16
    inv_omega: bool = True


WAYS = (
    Way("w4a8"),
    Way("w4a8, 64 in INT4", rank_shared=64, adapter_bits=4),
    Way("w4a8, 64 + 8 x 32 in float16", rank_shared=64, rank_routed=32, experts=8),
    Way("w4a16 g128", act_bits=0, group_size=128, zeros=True, inv_omega=False),
    Way("w3a8", weight_bits=3),
)


def copies(layer_bytes: int, beyond: int) -> int:
    """How many copies of a layer are used in turn, so that none is in the cache when its turn comes.

    Args:
        layer_bytes: What one copy reads.
        beyond: Bytes that all copies together exceed: more than the GPU's L2 cache holds.

    >>> copies(1 << 20, 100 << 20), copies(1 << 30, 100 << 20), copies(1, 100 << 20)
    (101, 2, 128)
    """
    return max(2, min(MOST_COPIES, beyond // max(1, layer_bytes) + 1))
