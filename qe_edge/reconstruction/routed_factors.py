"""Reads routed experts from stored adapters, and stores others in their place. The shared expert stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qe_edge.layers.linear import Adapters
from qe_edge.numerics.grids import pack_int4, quantize_int8, unpack_int4
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.packed_factors import DOWN_DAMPING, GRID, UP_DAMPING

INT8_LIMIT, INT4_LIMIT = 127, 7


@dataclass(frozen=True)
class RoutedFactors:
    """Real values of the routed experts, float32.

    Attributes:
        up: `[experts, out, rank]`.
        down: `[experts, rank, in]`.

    Example:
        >>> experts = RoutedFactors(up=torch.ones(2, 3, 1), down=torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> experts.output(1, torch.tensor([[2.0, 5.0]]))
        tensor([[5., 5., 5.]])
    """

    up: Tensor
    down: Tensor

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.up)

    def output(self, expert: int, tokens: Tensor) -> Tensor:
        """The output `[n, out]` of one expert on `tokens` `[n, in]`."""
        return (tokens @ self.down[expert].T) @ self.up[expert].T


def real_factors(adapters: Adapters, in_features: int) -> tuple[Tensor, Tensor]:
    """The real values of all experts, as inference uses them: down `[rank, in]` and up `[out, rank]`, float32.

    Example:
        >>> from qe_edge.reconstruction.factors import store_factor
        >>> down, up = store_factor(torch.ones(1, 2), "int8"), store_factor(torch.ones(3, 1), "int8")
        >>> ranks = {"rank_shared": 1, "rank_routed": 0, "num_experts": 0}
        >>> adapters = Adapters(down.codes, up.codes, down.scale, up.scale, **ranks, router=None)
        >>> [factor.round(decimals=2).tolist() for factor in real_factors(adapters, in_features=2)]
        [[[1.0, 1.0]], [[1.0], [1.0], [1.0]]]
    """
    down, up = _codes(adapters, in_features)
    down, up = down.float(), up.float()
    if adapters.down_scale is not None and adapters.up_scale is not None:
        return down * adapters.down_scale.float().unsqueeze(1), up * adapters.up_scale.float().unsqueeze(1)
    return down, up


def routed_factors(adapters: Adapters, in_features: int) -> RoutedFactors:
    """The routed experts alone.

    Example:
        >>> ranks = {"rank_shared": 1, "rank_routed": 2, "num_experts": 2}
        >>> router = torch.ones(2, 8).half()
        >>> adapters = Adapters(torch.ones(5, 8), torch.ones(4, 5), None, None, **ranks, router=router)
        >>> routed = routed_factors(adapters, in_features=8)
        >>> tuple(routed.up.shape), tuple(routed.down.shape)
        ((2, 4, 2), (2, 2, 8))
    """
    down, up = real_factors(adapters, in_features)
    down, up = down[adapters.rank_shared :], up[:, adapters.rank_shared :]
    experts, rank = adapters.num_experts, adapters.rank_routed
    return RoutedFactors(
        up.reshape(len(up), experts, rank).permute(1, 0, 2).contiguous(), down.reshape(experts, rank, in_features)
    )


def largest_up(adapters: Adapters) -> Tensor | None:
    """`[out]`, the largest magnitude that an entry of `up` can have on the stored scales; None for float factors.

    Example:
        >>> scale = torch.tensor([0.01, 0.5], dtype=torch.float16)
        >>> codes, router = torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 2).half()
        >>> ranks = {"rank_shared": 0, "rank_routed": 1, "num_experts": 2}
        >>> adapters = Adapters(codes, codes, scale, scale, **ranks, router=router)
        >>> largest_up(adapters).round(decimals=2)
        tensor([ 1.2700, 63.5000])
    """
    if adapters.up_scale is None:
        return None
    return adapters.up_scale.float() * (INT4_LIMIT if adapters.up.dtype == torch.uint8 else INT8_LIMIT)


def store_routed(adapters: Adapters, routed: RoutedFactors, grams: list[Tensor]) -> Adapters:
    """Adapters with other routed experts, rounded to the same storage.

    `up` has one scale per output channel across all experts, the shared one included, so it is rounded on the scales
    that are there. INT4 factors are rounded as in `packed_factors`: `down` by GPTQ; `up` is fitted to the rounded
    `down` and rounded column by column, and later columns make up for the error of each.

    Args:
        adapters: Adapters whose shared expert and router stay.
        routed: The experts to store; entries of `up` beyond `largest_up` saturate.
        grams: For every expert `[in, in]` float64, `X^T X` of its tokens up to a factor; read for INT4 only.

    Example:
        >>> ranks = {"rank_shared": 1, "rank_routed": 1, "num_experts": 2}
        >>> router = torch.ones(2, 8).half()
        >>> adapters = Adapters(torch.ones(3, 8), torch.ones(4, 3), None, None, **ranks, router=router)
        >>> routed = routed_factors(adapters, in_features=8)
        >>> stored = store_routed(adapters, replace(routed, down=routed.down * 2), grams=[])
        >>> stored.down[:, 0]  # the shared expert stays
        tensor([1., 2., 2.])
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
        gram: `[rank, rank]` float64, Gram matrix of the factor's input.
        scales: `[out]`; rows of scale 0 get codes 0.

    Example:
        >>> scales = torch.tensor([0.5, 0.0])
        >>> round_on_scales(torch.tensor([[1.1, 9.0], [1.0, 1.0]]).double(), torch.eye(2).double(), scales)
        tensor([[2, 7],
                [0, 0]], dtype=torch.int8)
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
