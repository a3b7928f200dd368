"""One canonical layer through the Triton kernels."""

from __future__ import annotations

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from oracle.kernels import multiply, prepare, project_down
from prepack.floats import Dtype
from prepack.linear import CanonicalLinear

TORCH: dict[Dtype, torch.dtype] = {"f16": torch.float16, "bf16": torch.bfloat16}
BN, BK, BR, MOST_EXPERTS = 128, 64, 128, 16


def pack_nibbles(q: NDArray[np.int8]) -> NDArray[np.uint8]:
    """``[K, N]`` to ``[K / 2, N]``: row 2j in the low nibble, row 2j + 1 in the high one."""
    nibbles = q.view(np.uint8) & 15
    return np.asarray(nibbles[0::2] | nibbles[1::2] << 4)


def triton_linear(linear: CanonicalLinear, x: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float32]:
    """Y ``[M, N]`` as the 16-bit type holds it. `x` is ``[M, K]`` with values that the type holds."""
    half, (tokens, k), n = TORCH[dtype], x.shape, linear.out_features
    absent = torch.zeros(1)

    def device(array: NDArray[np.generic] | None) -> torch.Tensor:
        """Integers as they are, floating point in the layer's type."""
        if array is None:
            return absent
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(half) if tensor.is_floating_point() else tensor

    x_half = device(x)
    values = torch.empty(tokens, k, dtype=torch.int8 if linear.act_bits else half)
    token_scale = torch.empty(tokens)
    expert = torch.zeros(tokens, dtype=torch.int32)
    BM = 16 if tokens <= 16 else 128
    rows = triton.cdiv(tokens, BM)
    prepare[(rows,)](
        x_half, device(linear.inv_omega), device(linear.router), values, token_scale, expert, tokens,
        linear.num_experts, K=k, TOP=2 ** (linear.act_bits - 1) - 1 if linear.act_bits else 0,
        SCALED=linear.inv_omega is not None, ROUTED=linear.router is not None and linear.num_experts > 1,
        BM=BM, BK=BK, BE=MOST_EXPERTS,
    )  # fmt: skip
    h, int8 = torch.zeros(tokens, max(1, linear.rank)), linear.coded_adapters
    if linear.rank:
        project_down[(rows, triton.cdiv(linear.rank, BR))](
            x_half, device(linear.down), device(linear.down_scale), expert, h, tokens, linear.rank,
            linear.rank_shared, max(1, linear.rank_routed), K=k, INT8=int8, BM=BM, BK=BK, BR=BR,
        )  # fmt: skip
    y = torch.full((tokens, n), torch.nan, dtype=half)
    multiply[(rows, triton.cdiv(n, BN))](
        values, token_scale, device(pack_nibbles(linear.qweight)), device(linear.scales), device(linear.zeros),
        h, device(linear.up), device(linear.up_scale), device(linear.bias), y, tokens, n,
        K=k, R=linear.rank, GROUP=max(0, linear.group_size), INTEGER=linear.act_bits > 0,
        ZEROS=linear.zeros is not None, LOWRANK=linear.rank > 0, INT8=int8, BIAS=linear.bias is not None,
        BM=BM, BN=BN, BK=BK, BR=BR,
    )  # fmt: skip
    return np.asarray(y.float().numpy())
