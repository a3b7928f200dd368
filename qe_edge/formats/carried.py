"""One quantized layer in the parts that other formats hold: codes, scales, zero points, bias, factors of a LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qe_edge.checkpoint.layer_files import LayerGeometry
from qe_edge.formats.folding import Folding
from qe_edge.formats.source import CheckpointSource
from qe_edge.layers.linear import QELinear
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid

ROWS = 1024  # of a unit matrix that a layer is applied to at a time


class Piece(NamedTuple):
    """A tensor that is made when it is written.

    Attributes:
        like: Its shape and dtype, on the meta device.
        make: Makes it.
    """

    like: Tensor
    make: Callable[[], Tensor]


def piece(shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Piece:
    """A `Piece` of a shape and dtype.

    Example:
        >>> ones = piece((2, 3), torch.float16, lambda: torch.ones(2, 3, dtype=torch.float16))
        >>> ones.like.device.type, tuple(ones.make().shape)  # made only when it is written
        ('meta', (2, 3))
    """
    return Piece(torch.empty(shape, dtype=dtype, device="meta"), make)


@dataclass(frozen=True, eq=False)
class CarriedLayer:
    """A layer with its channel scales folded away; every tensor is read and made when it is asked for.

    Attributes:
        source: The checkpoint.
        name: Name of the layer.
        folding: New places of the channel scales.
        decoded: Whether the main branch is written as an ordinary weight, which holds what has no place elsewhere.
        group: The part of the model that it belongs to: "visual", "merger", "language", or "head".
        wider: Another grid that holds the same numbers: of more bits, smaller groups, or with zero points; None for the
            layer's own.
    """

    source: CheckpointSource
    name: str
    folding: Folding
    decoded: bool = False
    group: str = "language"
    wider: WeightGrid | None = None

    @property
    def geometry(self) -> LayerGeometry:
        """Sizes of the layer."""
        return self.source.layers[self.name]

    @property
    def grid(self) -> WeightGrid:
        """The grid that codes, scales and zero points are given on: `wider`, or the layer's own."""
        return self.own_grid if self.wider is None else self.wider

    @property
    def own_grid(self) -> WeightGrid:
        """The grid of the checkpoint."""
        geometry = self.geometry
        return WeightGrid(geometry.weight_bits, geometry.group_size, symmetric="zeros" not in geometry.tensors)

    @property
    def groups(self) -> int:
        """Number of scales of an output channel."""
        return 1 if self.grid.group_size == PER_CHANNEL else self.geometry.in_features // self.grid.group_size

    @property
    def rank(self) -> int:
        """Rank of the correction, 0 for none."""
        return self.geometry.rank_shared + self.geometry.num_experts * self.geometry.rank_routed

    @property
    def scale_dtype(self) -> torch.dtype:
        """float16 as stored; float32 where factors of other layers are folded into the scales."""
        return torch.float32 if self.name in self.folding.rows else torch.float16

    def codes(self) -> Tensor:
        """int8 `[out, in]`; dropped channels have the codes of their zero points."""
        layer = self._layer()
        codes, dropped = layer.codes(), self.folding.dropped.get(self.name)
        if dropped is not None:
            zeros = torch.zeros(1, 1, dtype=torch.int8) if layer.zeros is None else layer.zeros
            spread = zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], dim=1).expand_as(codes)
            codes[:, dropped] = spread[:, dropped]
        return codes

    def scales(self) -> Tensor:
        """`[out, groups]` in `scale_dtype`."""
        scales, rows = self._stored("scales"), self.folding.rows.get(self.name)
        return self._regrouped(scales if rows is None else scales.float() * rows.unsqueeze(1))

    def zeros(self) -> Tensor:
        """int8 `[out, groups]`; 0 where the layer has none."""
        if self.own_grid.symmetric:
            return torch.zeros(self.geometry.out_features, self.groups, dtype=torch.int8)
        return self._regrouped(self._stored("zeros"))

    def bias(self) -> Tensor:
        """`[out]`, as stored unless factors are folded into it."""
        bias, rows = self._stored("bias"), self.folding.rows.get(self.name)
        return bias if rows is None else bias.float() * rows

    def down(self) -> Tensor:
        """Down factor float32 `[rank, in]` for the input as it arrives."""
        down, inputs = self._layer().down_matrix(), self.folding.inputs.get(self.name)
        if down is None:
            raise ValueError(f"{self.name} has no correction")
        return down if inputs is None else down / inputs

    def up(self) -> Tensor:
        """Up factor float32 `[out, rank]`."""
        up, rows = self._layer().up_matrix(), self.folding.rows.get(self.name)
        if up is None:
            raise ValueError(f"{self.name} has no correction")
        return up if rows is None else up * rows.unsqueeze(1)

    def weight(self) -> Tensor:
        """The main branch as one matrix float32 `[out, in]`, for the input as it arrives, which stays unrounded."""
        layer = self._layer()
        layer.activation_bits = 0
        layer.down = layer.up = layer.router = layer.bias = None
        layer.keep_decoded(True)
        columns = [
            layer(torch.eye(layer.in_features)[start : start + ROWS]) for start in range(0, layer.in_features, ROWS)
        ]
        weight = torch.cat(columns).T
        mixing, inputs, rows = self.folding.mixing, self.folding.inputs.get(self.name), self.folding.rows.get(self.name)
        if mixing is not None and self.name == mixing.head:
            weight = weight @ self.source.tensor(mixing.matrix).float()
        weight = weight if inputs is None else weight / inputs
        return weight if rows is None else weight * rows.unsqueeze(1)

    def bias_piece(self) -> dict[str, Piece]:
        """The bias under its name; nothing where there is none."""
        if "bias" not in self.geometry.tensors:
            return {}
        folded = self.name in self.folding.rows
        dtype = torch.float32 if folded else self._stored("bias").dtype
        return {f"{self.name}.bias": piece((self.geometry.out_features,), dtype, self.bias)}

    def _stored(self, key: str) -> Tensor:
        return self.source.tensor(f"{self.name}.{key}")

    def _layer(self) -> QELinear:
        return self.source.layer(self.name)

    def _regrouped(self, per_group: Tensor) -> Tensor:
        """`[out, own groups]` as `[out, groups]`."""
        return per_group.repeat_interleave(self.groups // per_group.shape[1], dim=1)
