"""The tensors of one canonical QELinear node, checked once so that nothing after needs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAX_RANK = 128
MAX_EXPERTS = 16


class PackError(ValueError):
    """A layer that the kernels cannot run. The message says what is wrong, then what to do."""


@dataclass(frozen=True)
class CanonicalLinear:
    """K = in_features, N = out_features, r = rank_shared + num_experts * rank_routed.

    Floating-point tensors are given as float32 arrays of values that the 16-bit type can hold.

    Attributes:
        qweight: int8 ``[K, N]``, values of INT4 (or INT3) in two's complement.
        scales: ``[K / group_size, N]``, or ``[1, N]`` for one scale per output channel.
        zeros: int8, the shape of ``scales``, for asymmetric weights.
        inv_omega: ``[K]``, the channel scale of the quantized branch.
        down: ``[K, r]``, floating point, or int8 (INT4 too) with ``down_scale`` ``[r]``.
        up: ``[r, N]``, floating point, or int8 (INT4 too) with ``up_scale`` ``[N]``.
        router: ``[K, num_experts]``.
        bias: ``[N]``.
    """

    qweight: NDArray[np.int8]
    scales: Array
    group_size: int = -1
    act_bits: int = 8
    zeros: NDArray[np.int8] | None = None
    inv_omega: Array | None = None
    down: Array | None = None
    up: Array | None = None
    down_scale: Array | None = None
    up_scale: Array | None = None
    router: Array | None = None
    bias: Array | None = None
    rank_shared: int = 0
    rank_routed: int = 0
    num_experts: int = 0

    @property
    def in_features(self) -> int:
        """K, the length of x."""
        return int(self.qweight.shape[0])

    @property
    def out_features(self) -> int:
        """N, the length of y."""
        return int(self.qweight.shape[1])

    @property
    def rank(self) -> int:
        """All columns of `down`: the shared expert and every routed one."""
        return self.rank_shared + self.num_experts * self.rank_routed

    @property
    def coded_adapters(self) -> bool:
        """Whether the low-rank factors are integers with scales."""
        return self.down is not None and self.down.dtype == np.int8

    def check(self) -> None:
        """Raise PackError for tensors whose shapes or types do not belong together."""
        k, n = self.in_features, self.out_features
        if self.group_size not in (-1, 64, 128):
            raise PackError(f"group_size is {self.group_size}. Use -1, 64 or 128.")
        if self.group_size > 0 and k % self.group_size:
            raise PackError(f"in_features {k} is not a multiple of group_size {self.group_size}. Use group_size -1.")
        groups = 1 if self.group_size < 0 else k // self.group_size
        _expect("scales", self.scales, (groups, n))
        if self.num_experts > MAX_EXPERTS or max(self.rank_shared, self.rank_routed) > MAX_RANK:
            raise PackError("Too many experts or too high a rank. Use at most 16 experts and ranks up to 128.")
        for name, shape in self._optional_shapes(groups).items():
            tensor = getattr(self, name)
            if tensor is not None:
                _expect(name, tensor, shape)
        if (self.down is None) != (self.rank == 0) or (self.up is None) != (self.rank == 0):
            raise PackError(
                f"Ranks sum to {self.rank} but the adapters say otherwise. Give both `down` and `up`, or neither."
            )
        if self.coded_adapters and (self.down_scale is None or self.up_scale is None):
            raise PackError("INT8 or INT4 adapters have no scales. Give down_scale and up_scale.")
        if self.num_experts > 1 and self.rank_routed and self.router is None:
            raise PackError("Several experts but no router. Give `router` of shape [K, num_experts].")
        if self.qweight.min(initial=0) < -8 or self.qweight.max(initial=0) > 7:
            raise PackError("qweight has values outside -8 to 7. Quantize to at most 4 bits.")

    def _optional_shapes(self, groups: int) -> dict[str, tuple[int, ...]]:
        k, n, r = self.in_features, self.out_features, self.rank
        return {
            "zeros": (groups, n),
            "inv_omega": (k,),
            "down": (k, r),
            "up": (r, n),
            "down_scale": (r,),
            "up_scale": (n,),
            "router": (k, self.num_experts),
            "bias": (n,),
        }


def _expect(name: str, tensor: Array, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise PackError(f"{name} has shape {list(tensor.shape)} instead of {list(shape)}. Export the layer again.")
