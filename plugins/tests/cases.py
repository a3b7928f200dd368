"""Random layers in every mode that the kernels claim."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prepack.floats import Dtype, rounded
from prepack.linear import CanonicalLinear


@dataclass(frozen=True)
class Mode:
    """One way to quantize a layer. The id of a test is its name."""

    name: str
    act_bits: int = 8
    group_size: int = -1
    zeros: bool = False
    weight_bits: int = 4
    dtype: Dtype = "f16"
    adapter_bits: int = 16
    rank_shared: int = 32
    rank_routed: int = 16
    experts: int = 8
    inv_omega: bool = True
    bias: bool = True


def random_layer(mode: Mode, k: int, n: int, seed: int = 0) -> CanonicalLinear:
    """A layer whose low-rank part is about as large as its quantized part, so that an error in either shows."""
    rng = np.random.default_rng(seed)
    dtype = mode.dtype

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> NDArray[np.float32]:
        return rounded(rng.standard_normal(shape) * scale, dtype)

    low, high = -(2 ** (mode.weight_bits - 1)), 2 ** (mode.weight_bits - 1)
    groups = 1 if mode.group_size < 0 else k // mode.group_size
    routed = mode.rank_routed if mode.experts else 0
    rank = mode.rank_shared + mode.experts * routed
    down: NDArray[np.generic] | None = None
    up: NDArray[np.generic] | None = None
    down_scale = up_scale = None
    if rank and mode.adapter_bits < 16:
        least, most = (-8, 7) if mode.adapter_bits == 4 else (-127, 127)
        down = rng.integers(least, most + 1, (k, rank)).astype(np.int8)
        up = rng.integers(least, most + 1, (rank, n)).astype(np.int8)
        step = 127 / most  # how much farther apart INT4 values are
        down_scale = rounded(rng.uniform(0.5, 1.5, rank) * step / (70 * k**0.5), dtype)
        up_scale = rounded(rng.uniform(0.5, 1.5, n) * step * 0.02, dtype)
        up_scale[3] = 0.0  # a dead column must not divide by zero
    elif rank:
        down, up = normal((k, rank), k**-0.5), normal((rank, n), 1.0)
    omega = rounded(rng.uniform(0.25, 1.0, k), dtype)
    omega[rng.integers(0, k, 5)] = 0.0
    return CanonicalLinear(
        qweight=rng.integers(low, high, (k, n)).astype(np.int8),
        scales=rounded(rng.uniform(0.5, 1.5, (groups, n)) * 0.4 / k**0.5, dtype),
        group_size=mode.group_size,
        act_bits=mode.act_bits,
        zeros=rng.integers(low, high, (groups, n)).astype(np.int8) if mode.zeros else None,
        inv_omega=omega if mode.inv_omega else None,
        down=down,
        up=up,
        down_scale=down_scale,
        up_scale=up_scale,
        router=rounded(rng.uniform(0.0, 1.0, (k, mode.experts)), dtype) if mode.experts else None,
        bias=normal((n,)) if mode.bias else None,
        rank_shared=mode.rank_shared,
        rank_routed=routed,
        num_experts=mode.experts,
    )


def random_tokens(mode: Mode, m: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    """Activations with outlier channels, and scores far enough apart that float32 and float64 route alike."""
    rng = np.random.default_rng(seed + 1000)
    x = rng.standard_normal((m, k))
    x[:, rng.integers(0, k, 4)] *= 8
    return rounded(x, mode.dtype)


def relative_error(y: NDArray[np.float32], reference: NDArray[np.float64]) -> float:
    """Frobenius norm of the difference over that of the reference; infinite when y is not finite."""
    if not np.isfinite(y).all():
        return float("inf")
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


LIMIT: dict[Dtype, float] = {"f16": 5e-4, "bf16": 4e-3}
