"""The quantized linear layer: INT4 codes, shared and routed low-rank correction.

`y = W_q Q_a(x * inv_omega) + L_SA L_SB x + L_RA[e] L_RB[e] x + b`, `e = argmin_i (R |x|)_i` per token (docs/method.md,
section 8). The low-rank branches read the unquantized input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qe_edge.layers.torch_parts import PART_TENSORS, TorchParts
from qe_edge.numerics.codebooks import Codebook, decode_codebook
from qe_edge.numerics.grids import (
    PER_CHANNEL,
    QuantizedWeight,
    decode_weight,
    fake_quantize_activation,
    pack_codes,
    unpack_codes,
    unpack_int4,
)

Parts = TypeVar("Parts", bound=Any)


@dataclass(frozen=True)
class Adapters:
    """Low-rank correction of a linear layer; all factors lie side by side, the shared expert first.

    Both factors are stored alike: as real numbers, as int8 codes, or as INT4 codes two a byte along the rows.

    Attributes:
        down: `[rank, in]` float or int8, or uint8 `[rank, ceil(in / 2)]`; rank = rank_shared + num_experts *
            rank_routed.
        up: `[out, rank]` float or int8, or uint8 `[out, ceil(rank / 2)]`.
        down_scale: `[rank]` float16, or None for float factors.
        up_scale: `[out]` float16, or None for float factors.
        rank_shared: Rank of the shared expert.
        rank_routed: Rank of every routed expert.
        num_experts: Number of routed experts.
        router: `[num_experts, in]` float16 scores on |x|, lowest wins; None for fewer than two experts.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> down, up = torch.randn(4, 64), torch.randn(32, 4)  # rank 4: two shared, two experts of rank 1
        >>> router = torch.rand(2, 64).half()
        >>> adapters = Adapters(down, up, None, None, rank_shared=2, rank_routed=1, num_experts=2, router=router)
        >>> tuple(adapters.rows(0, 16).up.shape)
        (16, 4)
    """

    down: Tensor
    up: Tensor
    down_scale: Tensor | None
    up_scale: Tensor | None
    rank_shared: int
    rank_routed: int
    num_experts: int
    router: Tensor | None

    def rows(self, start: int, stop: int) -> Adapters:
        """The correction of output channels `start:stop`; `down` and the router stay shared (the same tensors)."""
        up_scale = None if self.up_scale is None else self.up_scale[start:stop].clone()
        return replace(self, up=self.up[start:stop].clone(), up_scale=up_scale)


@dataclass(frozen=True)
class QuantizedLinear:
    """The result of a method for one linear problem.

    Attributes:
        weight: Integer codes and scales of the main branch.
        activation_bits: Width of the per-token activation grid, 0 for none.
        inv_omega: `[in]` float16 factor on the main branch's input (0 drops a channel), or None.
        adapters: Low-rank correction, or None.
        parts: Parts that only PyTorch runs, or None; such a layer cannot be exported.

    Example:
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> stacked = QuantizedLinear(quantize_weight(torch.ones(48, 64), WeightGrid(4)), activation_bits=8)
        >>> query, key, value = stacked.split([32, 8, 8])
        >>> query.weight.out_features, value.weight.out_features
        (32, 8)
    """

    weight: QuantizedWeight
    activation_bits: int
    inv_omega: Tensor | None = None
    adapters: Adapters | None = None
    parts: TorchParts | None = None

    @property
    def in_features(self) -> int:
        """Number of input channels, those with codes of 8 bits included."""
        return self.weight.in_features + (self.parts.fine if self.parts else 0)

    def to(self, device: torch.device) -> QuantizedLinear:
        """The same with all tensors on a device."""
        return moved_tensors(self, device)

    def split(self, sizes: Iterable[int]) -> list[QuantizedLinear]:
        """Cut a stacked problem back into its siblings of `sizes` output channels each."""
        siblings, start = [], 0
        for size in sizes:
            if size == self.weight.out_features:
                return [self]
            stop = start + size
            adapters = None if self.adapters is None else self.adapters.rows(start, stop)
            parts = None if self.parts is None else self.parts.rows(start, stop)
            siblings.append(replace(self, weight=self.weight.rows(start, stop), adapters=adapters, parts=parts))
            start = stop
        return siblings


class QELinear(nn.Module):
    """A linear layer with quantized weights; drop-in for `nn.Linear` in inference.

    Buffers (all optional ones may be None): `qweight` uint8 `[out, ceil(in * bits / 8)]` packed codes; `scales` float16
    `[out, groups]`; `zeros` int8 `[out, groups]`; `inv_omega` float16 `[in]`; `down`, `up`, `down_scale`, `up_scale`,
    `router` as in `Adapters`; `bias` `[out]`; the tensors of `TorchParts`, which no exported graph can hold.

    Inputs of any float dtype and shape `[..., in]`; computed in float32 and returned in the input's dtype.

    Example:
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(10, 64)
        >>> layer = QELinear(QuantizedLinear(quantize_weight(weight, WeightGrid(bits=4)), activation_bits=8))
        >>> layer.qweight.dtype, tuple(layer.qweight.shape), tuple(layer.scales.shape)
        (torch.uint8, (32, 32), (32, 1))
        >>> exact = tokens @ weight.T
        >>> f"relative error {float((layer(tokens) - exact).norm() / exact.norm()):.2f}"
        'relative error 0.11'
    """

    TENSORS = (
        "qweight", "scales", "zeros", "inv_omega", "down", "up", "down_scale", "up_scale", "router", "bias",
        *PART_TENSORS,
    )  # fmt: skip

    def __init__(self, quantized: QuantizedLinear, bias: Tensor | None = None) -> None:
        super().__init__()
        weight, adapters = quantized.weight, quantized.adapters
        self.in_features = quantized.in_features
        self.out_features = weight.out_features
        self.weight_bits = weight.bits
        self.group_size = weight.group_size
        self.activation_bits = quantized.activation_bits
        self.activation_group = quantized.parts.activation_group if quantized.parts else PER_CHANNEL
        self.codebook: Codebook = quantized.parts.codebook if quantized.parts else "integers"
        self.rank_shared = adapters.rank_shared if adapters else 0
        self.rank_routed = adapters.rank_routed if adapters else 0
        self.num_experts = adapters.num_experts if adapters else 0
        self.register_buffer("qweight", pack_codes(weight.codes, weight.bits))
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.register_buffer("inv_omega", quantized.inv_omega)
        for name in ("down", "up", "down_scale", "up_scale", "router"):
            self.register_buffer(name, getattr(adapters, name) if adapters else None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        for name in PART_TENSORS:
            self.register_buffer(name, getattr(quantized.parts, name) if quantized.parts else None)
        self._decoded: Tensor | None = None
        self._keep_decoded = False

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    inv_omega: Tensor | None
    down: Tensor | None
    up: Tensor | None
    down_scale: Tensor | None
    up_scale: Tensor | None
    router: Tensor | None
    bias: Tensor | None
    fine_codes: Tensor | None

    @property
    def parts(self) -> TorchParts | None:
        """The parts of this layer that only PyTorch runs, or None."""
        present = {name: tensor for name in PART_TENSORS if (tensor := getattr(self, name)) is not None}
        if not present and self.activation_group == PER_CHANNEL and self.codebook == "integers":
            return None
        return TorchParts(codebook=self.codebook, activation_group=self.activation_group, **present)

    def extra_repr(self) -> str:
        """Shape, precision and ranks."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weight_bits={self.weight_bits}, "
            f"group_size={self.group_size}, activation_bits={self.activation_bits}, rank_shared={self.rank_shared}, "
            f"experts={self.num_experts}x{self.rank_routed}"
        )

    def codes(self) -> Tensor:
        """Integer codes int8 `[out, in]`, without channels that have codes of 8 bits."""
        fine = 0 if self.fine_codes is None else self.fine_codes.shape[1]
        return unpack_codes(self.qweight, self.in_features - fine, self.weight_bits)

    def decoded_weight(self) -> Tensor:
        """Weight of the main branch, float32 `[out, in]`."""
        if self._decoded is not None:
            return self._decoded
        if self.codebook == "integers":
            decoded = decode_weight(self.codes(), self.scales, self.zeros)
        else:
            decoded = decode_codebook(self.codes(), self.scales, self.weight_bits, self.codebook)
        if self._keep_decoded:
            self._decoded = decoded
        return decoded

    def keep_decoded(self, keep: bool) -> None:
        """Keep the float32 weight between calls: faster on a CPU, 4 bytes a weight."""
        self._keep_decoded = keep
        if not keep:
            self._decoded = None

    @property
    def packed_factors(self) -> bool:
        """Whether the low-rank factors are INT4 codes, two a byte."""
        return self.down is not None and self.down.dtype == torch.uint8

    def down_codes(self) -> Tensor | None:
        """Down factor `[rank, in]` as stored, INT4 codes unpacked to int8; None without one."""
        return unpack_int4(self.down, self.in_features) if self.packed_factors and self.down is not None else self.down

    def up_codes(self) -> Tensor | None:
        """Up factor `[out, rank]` as stored, INT4 codes unpacked to int8; None without one."""
        rank = self.rank_shared + self.num_experts * self.rank_routed
        return unpack_int4(self.up, rank) if self.packed_factors and self.up is not None else self.up

    def down_matrix(self) -> Tensor | None:
        """Real-valued down factor float32 `[rank, in]`, or None."""
        return _real_factor(self.down_codes(), self.down_scale)

    def up_matrix(self) -> Tensor | None:
        """Real-valued up factor float32 `[out, rank]`, or None."""
        return _real_factor(self.up_codes(), self.up_scale)

    def expert_index(self, x: Tensor) -> Tensor | None:
        """Routed expert of every token of `x` `[..., in]`, or None without a router; ties go to the lowest index."""
        if self.router is None:
            return None
        scores = x.float().abs() @ self.router.float().T
        valid = torch.isfinite(scores).all(-1)
        return torch.where(valid, scores.nan_to_num().argmin(-1), 0)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` `[..., in]`; returns `[..., out]` in the dtype of `x`."""
        tokens = x.float()
        main = tokens if self.inv_omega is None else tokens * self.inv_omega.float()
        parts, weight = self.parts, self.decoded_weight()
        if parts is None:
            y = fake_quantize_activation(main, self.activation_bits) @ weight.T
        else:
            y = parts.product(main, tokens, weight, self.activation_bits)
        down, up = self.down_matrix(), self.up_matrix()
        if down is not None and up is not None:
            hidden = tokens @ down.T
            expert = self.expert_index(tokens)
            if expert is not None:
                hidden = hidden * rank_mask(self.rank_shared, self.rank_routed, self.num_experts).to(x.device)[expert]
            y = y + hidden @ up.T
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


def moved_tensors(parts: Parts, device: torch.device) -> Parts:
    """A dataclass of tensors, or of such dataclasses, on a device.

    Example:
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> weight = quantize_weight(torch.ones(4, 8), WeightGrid(4))
        >>> moved_tensors(weight, torch.device("meta")).codes.device
        device(type='meta')
    """
    values = {one.name: getattr(parts, one.name) for one in fields(parts)}
    changed = {
        name: value.to(device) if isinstance(value, Tensor) else moved_tensors(value, device)
        for name, value in values.items()
        if isinstance(value, Tensor) or is_dataclass(value)
    }
    return replace(parts, **changed)


def rank_mask(rank_shared: int, rank_routed: int, num_experts: int) -> Tensor:
    """The ranks that each expert uses, as 1 and 0: float32 `[num_experts, rank]`. Shared ranks are always 1.

    Example:
        >>> rank_mask(rank_shared=1, rank_routed=2, num_experts=2)
        tensor([[1., 1., 1., 0., 0.],
                [1., 0., 0., 1., 1.]])
    """
    routed = torch.eye(num_experts).repeat_interleave(rank_routed, dim=1)
    return torch.cat((torch.ones(num_experts, rank_shared), routed), dim=1)


def quantized_linears(model: nn.Module) -> dict[str, QELinear]:
    """Every `QELinear` of a model by dotted name, in module order.

    Example:
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> layer = QELinear(QuantizedLinear(quantize_weight(torch.ones(4, 8), WeightGrid(4)), 8))
        >>> list(quantized_linears(nn.Sequential(layer, nn.ReLU())))
        ['0']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, QELinear)}


def _real_factor(codes: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if codes is None or scale is None:
        return None if codes is None else codes.float()
    # down has its scale per rank row, up per output row: rows either way
    return codes.float() * scale.float().unsqueeze(1)
