"""The two static parts of a corrected layer: the quantized main branch, and one low-rank correction for all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qe_edge.calibration.statistics import InputStatistics
from qe_edge.layers.linear import Adapters
from qe_edge.numerics.grids import QuantizedWeight, WeightGrid, fake_quantize_activation, rounds_activations
from qe_edge.numerics.matrices import Matrix, to_tensor
from qe_edge.reconstruction.factors import AdapterDtype, fit_down_factor, store_factor, store_up_factors
from qe_edge.reconstruction.gptq import Hessian
from qe_edge.reconstruction.rounding import Rounding
from qe_edge.system.blas import working_dtype
from qe_edge.system.device import CPU

ChannelMode = Literal["drop", "scale"]
NEAREST = Rounding()
SOME_TOKENS = 2048


@dataclass(frozen=True)
class MainBranch:
    """A quantized weight, and its error, which the correction makes up for.

    Attributes:
        weight: Codes; the columns that were left out are exactly zero.
        inv_omega: `[in]` float16 factor on the branch's input, or None.
        error: `[out, in]`, `W` minus the weight that the branch computes with; whole columns of `W` for channels that
            were left out. float32 in large layers (`working_dtype`), else float64; on the Gram matrix's device.
    """

    weight: QuantizedWeight
    inv_omega: Tensor | None
    error: Matrix


def leave_out_channels(
    weight: Tensor,
    grid: WeightGrid,
    channels: np.ndarray,
    abs_mean: np.ndarray,
    mode: ChannelMode,
    rounding: Rounding = NEAREST,
    hessian: Hessian | None = None,
) -> MainBranch:
    """Quantize `weight` `[out, in]` without the input channels `channels` (docs/method.md, section 5.2).

    Args:
        weight: Float32.
        grid: Grid of the codes.
        channels: Indices of the channels that the correction carries; may be empty.
        abs_mean: `[in]` mean |x|.
        mode: "drop" sets these channels of the branch's input to zero, "scale" divides them down to the smallest.
        rounding: Rule that chooses the codes.
        hessian: Gram matrix `[in, in]`; plain nearest rounding does without it.

    Example:
        >>> weight = torch.tensor([[0.7, 9.0, -0.3], [0.2, -8.0, 0.7]])
        >>> branch = leave_out_channels(weight, WeightGrid(4), np.array([1]), abs_mean=np.ones(3), mode="drop")
        >>> branch.inv_omega.tolist()
        [1.0, 0.0, 1.0]
        >>> branch.error.round(2).tolist()  # the correction has to carry channel 1 alone
        [[0.0, 9.0, -0.0], [0.0, -8.0, 0.0]]
    """
    left_out = torch.from_numpy(channels.copy()).to(weight.device)
    kept = weight
    if len(channels):
        kept = weight.clone()
        kept[:, left_out] = 0.0
    if hessian is not None:  # a channel that the main branch does not carry can make up for no other one
        hessian = hessian.without(channels)
    quantized, inv_omega = rounding(kept, grid, hessian, abs_mean)
    del kept
    dtype = torch.float64 if working_dtype(weight.numel()) is np.float64 else torch.float32
    error = quantized.decode().to(dtype)
    if inv_omega is not None:
        error *= inv_omega.to(dtype)
    torch.sub(weight.to(dtype), error, out=error)
    if len(channels):
        factor = np.ones(weight.shape[1]) if inv_omega is None else inv_omega.double().cpu().numpy()
        mean = np.maximum(abs_mean[channels], 1e-8)
        factor[channels] = 0.0 if mode == "drop" else mean.min() / mean
        inv_omega = torch.from_numpy(factor).to(weight.device, torch.float16)
    there = hessian is not None and isinstance(hessian.gram, Tensor)
    return MainBranch(quantized, inv_omega, error if there else error.numpy())


def static_correction(error: np.ndarray, directions: np.ndarray, dtype: AdapterDtype) -> Adapters | None:
    """The correction `U U^T E` in storage precision, for every token the same; None for rank 0.

    Args:
        error: `[out, in]`.
        directions: `U` `[out, rank]`.
        dtype: Storage of the factors.

    Example:
        >>> error = np.array([[3.0, 6.0], [4.0, 8.0]])  # of rank 1
        >>> adapters = static_correction(error, np.array([[0.6], [0.8]]), "float32")
        >>> adapters.up @ adapters.down
        tensor([[3., 6.],
                [4., 8.]])
    """
    if not directions.shape[1]:
        return None
    up, rounded = store_up_factors([directions], dtype)
    down = store_factor(fit_down_factor(rounded[0], error), dtype)
    return Adapters(
        down=down.codes,
        up=up.codes,
        down_scale=down.scale,
        up_scale=up.scale,
        rank_shared=directions.shape[1],
        rank_routed=0,
        num_experts=0,
        router=None,
    )


def some_tokens(statistics: InputStatistics) -> Tensor:
    """About `SOME_TOKENS` of the sampled tokens `[n, in]`, spread evenly.

    Example:
        >>> from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
        >>> tokens = torch.ones(5000, 4)
        >>> measured = collect_statistics("mlp", torch.ones(2, 4), tokens, StatisticsRequest(), seed=0)
        >>> tuple(some_tokens(measured).shape)
        (2500, 4)
    """
    return to_tensor(statistics.tokens[:: max(1, len(statistics.tokens) // SOME_TOKENS)])


def activation_rounding(tokens: Tensor, branch: MainBranch, bits: int) -> Tensor:
    """The error `[n, out]` that rounded activations cause in the main branch's output on `tokens` `[n, in]`.

    Example:
        >>> branch = leave_out_channels(torch.eye(2), WeightGrid(4), np.array([], np.int64), np.ones(2), "drop")
        >>> activation_rounding(torch.tensor([[127.0, 0.25]]), branch, bits=8).round(decimals=2)
        tensor([[0.0000, 0.2500]])
    """
    main = tokens if branch.inv_omega is None else tokens * branch.inv_omega.float()
    if not rounds_activations(bits):
        return tokens.new_zeros(len(tokens), branch.weight.out_features)
    lost = main - fake_quantize_activation(main, bits)
    if lost.device != CPU:
        return lost @ branch.weight.decode().T
    return torch.from_numpy(lost.numpy() @ branch.weight.decode().numpy().T)
