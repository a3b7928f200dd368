"""Routed experts out of and back into stored adapters; the shared expert's stored numbers stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qe_edge.layers.linear import Adapters
from qe_edge.numerics.grids import pack_int4, quantize_int8, unpack_int4
from qe_edge.reconstruction.packed_factors import DOWN_DAMPING, GRID, UP_DAMPING
from qe_edge.reconstruction.rounding import gptq_round

INT8_LIMIT, INT4_LIMIT = 127, 7


@dataclass(frozen=True)
class RoutedFactors:
    """Real values of the routed experts, float32.

    Attributes:
        up: `[experts, out, rank]`.
        down: `[experts, rank, in]`.
    """

    up: Tensor
    down: Tensor

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.up)

    def output(self, expert: int, tokens: Tensor) -> Tensor:
        """What one expert adds on `tokens` `[n, in]`, `[n, out]`."""
        return (tokens @ self.down[expert].T) @ self.up[expert].T


def real_factors(adapters: Adapters, in_features: int) -> tuple[Tensor, Tensor]:
    """The real values that inference uses, of all experts: down `[rank, in]`, up `[out, rank]`, float32."""
    down, up = _codes(adapters, in_features)
    down, up = down.float(), up.float()
    if adapters.down_scale is not None and adapters.up_scale is not None:
        return down * adapters.down_scale.float().unsqueeze(1), up * adapters.up_scale.float().unsqueeze(1)
    return down, up


def routed_factors(adapters: Adapters, in_features: int) -> RoutedFactors:
    """The routed experts alone."""
    down, up = real_factors(adapters, in_features)
    down, up = down[adapters.rank_shared :], up[:, adapters.rank_shared :]
    experts, rank = adapters.num_experts, adapters.rank_routed
    return RoutedFactors(
        up.reshape(len(up), experts, rank).permute(1, 0, 2).contiguous(), down.reshape(experts, rank, in_features)
    )


def largest_up(adapters: Adapters) -> Tensor | None:
    """`[out]`, the largest magnitude that an entry of `up` can have on the stored scales; None for float factors."""
    if adapters.up_scale is None:
        return None
    return adapters.up_scale.float() * (INT4_LIMIT if adapters.up.dtype == torch.uint8 else INT8_LIMIT)


def store_routed(adapters: Adapters, routed: RoutedFactors, grams: list[Tensor]) -> Adapters:
    """Adapters with other routed experts, rounded to the same storage.

    `up` has one scale per output channel across all experts, the shared one included, so it is rounded on the scales
    that are there. INT4 factors are rounded as in `packed_factors`: `down` by GPTQ, `up` fitted to what it has
    become and rounded with the error of every column spread over those to come.

    Args:
        adapters: Whose shared expert and router stay.
        routed: The experts to store; entries of `up` beyond `largest_up` saturate.
        grams: For every expert `[in, in]` float64, `X^T X` of its tokens up to a factor; read for INT4 only.
    """
    codes_down, codes_up = (part.clone() for part in _codes(adapters, routed.down.shape[2]))
    scale = None if adapters.down_scale is None else adapters.down_scale.clone()
    rank = adapters.rank_routed
    for expert in range(routed.experts):
        span = slice(adapters.rank_shared + expert * rank, adapters.rank_shared + (expert + 1) * rank)
        up, down = routed.up[expert], routed.down[expert]
        if adapters.up_scale is None or scale is None:
            codes_down[span], codes_up[:, span] = down.to(codes_down.dtype), up.to(codes_up.dtype)
        elif adapters.down.dtype == torch.uint8:
            rounded = gptq_round(down, grams[expert].numpy(), GRID, DOWN_DAMPING, clip=True)
            codes_down[span], scale[span] = rounded.codes, rounded.scales[:, 0]
            decoded = rounded.decode().double()
            spread = grams[expert] @ decoded.T
            hidden, wanted = decoded @ spread, up.double() @ (down.double() @ spread)
            fitted = torch.linalg.lstsq(hidden, wanted.T, rcond=1e-10, driver="gelsd").solution.T
            codes_up[:, span] = round_on_scales(fitted, hidden, adapters.up_scale)
        else:
            codes_down[span], scale[span] = quantize_int8(down, 0)
            codes_up[:, span] = _nearest(up, adapters.up_scale.float(), INT8_LIMIT)
    if adapters.down.dtype == torch.uint8:
        codes_down, codes_up = pack_int4(codes_down), pack_int4(codes_up)
    return replace(adapters, down=codes_down, up=codes_up, down_scale=scale)


def round_on_scales(matrix: Tensor, gram: Tensor, scales: Tensor) -> Tensor:
    """GPTQ on scales that are given: int8 codes in [-7, 7].

    Args:
        matrix: `[out, rank]` float64.
        gram: `[rank, rank]` float64 of what it multiplies.
        scales: `[out]`; rows of scale 0 get codes 0.
    """
    hessian = gram.clone()
    hessian.diagonal()[hessian.diagonal() <= 0] = 1.0
    hessian.diagonal().add_(UP_DAMPING * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left, scale = matrix.clone(), scales.double()
    codes = torch.empty(matrix.shape, dtype=torch.int8)
    for column in range(matrix.shape[1]):
        code = _nearest(left[:, column : column + 1], scale, INT4_LIMIT)
        error = (left[:, column] - code[:, 0] * scale) / factor[column, column]
        left[:, column + 1 :] -= torch.outer(error, factor[column, column + 1 :])
        codes[:, column] = code[:, 0]
    return codes


def _nearest(matrix: Tensor, scales: Tensor, limit: int) -> Tensor:
    divisor = torch.where(scales > 0, scales, torch.inf).unsqueeze(1)
    return torch.round(matrix / divisor).clamp_(-limit, limit).to(torch.int8)


def _codes(adapters: Adapters, in_features: int) -> tuple[Tensor, Tensor]:
    """Down and up as stored, INT4 codes unpacked to int8."""
    if adapters.down.dtype != torch.uint8:
        return adapters.down, adapters.up
    rank = adapters.rank_shared + adapters.num_experts * adapters.rank_routed
    return unpack_int4(adapters.down, in_features), unpack_int4(adapters.up, rank)
