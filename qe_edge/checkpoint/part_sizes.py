"""Sizes of the parts of a layer that only PyTorch runs, and the checks of these parts on reading."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from qe_edge.layers.linear import QELinear
from qe_edge.layers.torch_parts import PART_TENSORS, TorchParts, column_dtype
from qe_edge.numerics.codebooks import BLOCK, Codebook
from qe_edge.numerics.grids import PER_CHANNEL

MAX_FEATURES = 1 << 20
Side = Annotated[int, Field(ge=1, le=MAX_FEATURES)]
Shapes = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...], bool]]


class PartSizes(BaseModel):
    """Sizes from which the shapes of a layer's `TorchParts` follow, as stored in config.json.

    Attributes:
        fine: Input channels with codes of 8 bits.
        codebook: Codebook of the weight's codes.
        activation_group: Channels of a token that share an activation scale, -1 for all.
        in_factors: Sides of the two factors of the inputs' basis; None without one.
        out_factors: The same of the outputs.
        outliers: Number of outliers.
        image_rank: Rank of the correction of image tokens; None where all tokens are alike.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    fine: int = Field(0, ge=0, le=MAX_FEATURES)
    codebook: Codebook = "integers"
    activation_group: int = Field(PER_CHANNEL, ge=-1, le=MAX_FEATURES)
    in_factors: tuple[Side, Side] | None = None
    out_factors: tuple[Side, Side] | None = None
    outliers: int = Field(0, ge=0, le=1 << 40)
    image_rank: int | None = Field(None, ge=0, le=MAX_FEATURES)

    @classmethod
    def of(cls, layer: QELinear) -> PartSizes | None:
        """Sizes of a layer's parts; None if it has none."""
        parts = layer.parts
        if parts is None:
            return None

        def factors(left: Tensor | None, right: Tensor | None) -> tuple[int, int] | None:
            return None if left is None or right is None else (len(left), len(right))

        image_rank = 0 if parts.image_down is None else len(parts.image_down)
        return cls(
            fine=parts.fine,
            codebook=parts.codebook,
            activation_group=parts.activation_group,
            in_factors=factors(parts.in_left, parts.in_right),
            out_factors=factors(parts.out_left, parts.out_right),
            outliers=0 if parts.outlier_values is None else len(parts.outlier_values),
            image_rank=image_rank if parts.image_router is not None else None,
        )

    def problem(self, out_features: int, in_features: int, bits: int) -> str | None:
        """A contradiction between the sizes of a layer with codes of `bits`, in a few words; None if there is none."""
        kept = in_features - self.fine
        if kept < 1:
            return f"{self.fine} of {in_features} channels have codes of 8 bits"
        if self.activation_group != PER_CHANNEL and (self.activation_group < 1 or kept % self.activation_group):
            return f"activation groups of {self.activation_group} do not divide {kept} inputs"
        if self.codebook == "e8p" and (kept % BLOCK or bits not in (2, 4)):
            return f"{kept} codes of {bits} bits are no lattice points"
        for factors, size in ((self.in_factors, in_features), (self.out_factors, out_features)):
            if factors and factors[0] * factors[1] != size:
                return f"a basis of {factors[0]} x {factors[1]} does not fit {size} channels"
        return None

    def shapes(self, out_features: int, in_features: int) -> Shapes:
        """For every tensor its shape, the dtypes it may have, and whether it must exist."""
        table: Shapes = {"order": ((in_features,), (torch.int32,), False)}
        if self.fine:
            table["fine_codes"] = ((out_features, self.fine), (torch.int8,), True)
            table["fine_scale"] = ((out_features,), (torch.float16,), True)
        for side, factors, size in (("in", self.in_factors, in_features), ("out", self.out_factors, out_features)):
            if factors:
                table[f"{side}_signs"] = ((size,), (torch.int8,), False)
                for name, part in zip(("left", "right"), factors, strict=True):
                    table[f"{side}_{name}"] = ((part, part), (torch.float16,), True)
        if self.outliers:
            table["outlier_starts"] = ((out_features + 1,), (torch.int32,), True)
            table["outlier_columns"] = ((self.outliers,), (column_dtype(in_features),), True)
            table["outlier_values"] = ((self.outliers,), (torch.float16,), True)
        if self.image_rank is not None:
            table |= dict.fromkeys(("image_router", "image_inverse"), ((in_features,), (torch.float16,), True))
        if self.image_rank:
            table["image_down"] = ((self.image_rank, in_features), (torch.float16,), True)
            table["image_up"] = ((out_features, self.image_rank), (torch.float16,), True)
        return table

    def build(self, tensors: dict[str, Tensor], in_features: int) -> tuple[TorchParts, str | None]:
        """The parts from tensors of the right shapes, and a problem with their numbers in a few words, or None."""
        parts = TorchParts(
            codebook=self.codebook,
            activation_group=self.activation_group,
            **{name: tensors[name] for name in PART_TENSORS if name in tensors},
        )
        if parts.order is not None and not torch.equal(
            parts.order.sort().values, torch.arange(in_features, dtype=torch.int32)
        ):
            return parts, "'order' is no order of its inputs"
        starts, columns = parts.outlier_starts, parts.outlier_columns
        if starts is not None and columns is not None:
            ends = int(starts[0]) == 0 and int(starts[-1]) == len(columns) and bool((starts.long().diff() >= 0).all())
            if not ends or int(columns.min()) < 0 or int(columns.max()) >= in_features:
                return parts, "an outlier lies outside it"
        return parts, None
