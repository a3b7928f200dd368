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
from qe_edge.reconstruction.rounding import Hessian, Rounding
from qe_edge.system.blas import working_dtype
from qe_edge.system.device import CPU

ChannelMode = Literal["drop", "scale"]
NEAREST = Rounding()
SOME_TOKENS = 2048


@dataclass(frozen=True)
class MainBranch:
    """A quantized weight and what it leaves to the correction.

    Attributes:
        weight: Codes; the columns that were left out are exactly zero.
        inv_omega: `[in]` float16 factor on the branch's input, or None.
        error: `[out, in]`, what the branch's weight lacks of `W`; whole columns where they were left out. float32 in
            large layers (`working_dtype`), else float64; where the Gram matrix is.
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
        channels: Indices of the channels that the correction is to carry; may be empty.
        abs_mean: `[in]` mean |x|.
        mode: What the branch's input does with them: "drop" zeroes them, "scale" divides them down to the smallest.
        rounding: How the codes are chosen.
        hessian: Gram matrix `[in, in]`; plain nearest rounding does without it.
    """
    left_out = torch.from_numpy(channels.copy()).to(weight.device)
    kept = weight.clone()
    kept[:, left_out] = 0.0
    if hessian is not None and len(channels):
        # a channel that the main branch does not carry can make up for no other one
        gram = hessian.gram.clone() if isinstance(hessian.gram, Tensor) else hessian.gram.copy()
        numbers = left_out if isinstance(gram, Tensor) else channels
        gram[numbers, :] = 0.0
        gram[:, numbers] = 0.0
        hessian = Hessian(gram)
    quantized, inv_omega = rounding(kept, grid, hessian, abs_mean)
    dtype = torch.float64 if working_dtype(weight.numel()) is np.float64 else torch.float32
    error = quantized.decode().to(dtype)
    if inv_omega is not None:
        error *= inv_omega.to(dtype)
    torch.sub(weight.to(dtype), error, out=error)
    if len(channels):
        factor = np.ones(kept.shape[1]) if inv_omega is None else inv_omega.double().cpu().numpy()
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
    """About `SOME_TOKENS` of the sampled tokens `[n, in]`, spread evenly."""
    return to_tensor(statistics.tokens[:: max(1, len(statistics.tokens) // SOME_TOKENS)])


def activation_rounding(tokens: Tensor, branch: MainBranch, bits: int) -> Tensor:
    """What rounding the activations takes from the main branch's output on `tokens` `[n, in]`, `[n, out]`."""
    main = tokens if branch.inv_omega is None else tokens * branch.inv_omega.float()
    if not rounds_activations(bits):
        return tokens.new_zeros(len(tokens), branch.weight.out_features)
    lost = main - fake_quantize_activation(main, bits)
    if lost.device != CPU:
        return lost @ branch.weight.decode().T
    return torch.from_numpy(lost.numpy() @ branch.weight.decode().numpy().T)
