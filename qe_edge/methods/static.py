"""Base of the methods with one static low-rank correction: options and ranks."""

from __future__ import annotations

from typing import Literal, TypeVar

from pydantic import Field

from qe_edge.budget.model import AdapterSize
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.reconstruction.ranks import scale_rank


class StaticOptions(MethodOptions):
    """Options of a static low-rank correction.

    Attributes:
        rank: Rank; the paper compares at 64, the rank that one token uses in Quant Experts.
        shrink: Scale the rank down on small layers by the same rule as Quant Experts.
        adapter_dtype: Storage of the factors.
        stack_siblings: Treat layers that read the same input as one.
    """

    rank: int = Field(64, ge=0, le=2048)
    shrink: bool = True
    adapter_dtype: Literal["int8", "float16", "float32"] = "int8"
    stack_siblings: bool = True


StaticType = TypeVar("StaticType", bound=StaticOptions)


class StaticCorrection(Method[StaticType]):
    """A method that quantizes the weight and corrects the error with one low-rank pair.

    Example:
        >>> from qe_edge.methods.lorc import LoRC
        >>> method = LoRC(StaticOptions(rank=64))
        >>> method.rank(4096, 4096), method.rank(576, 576)
        (64, 32)
    """

    @property
    def stack_siblings(self) -> bool:
        """Whether siblings share one down factor."""
        return self.options.stack_siblings

    def adapter_size(self, out_features: int, in_features: int) -> AdapterSize:
        """Rank for a layer of this shape."""
        bits = {"int8": 8, "float16": 16, "float32": 32}[self.options.adapter_dtype]
        return AdapterSize(rank_shared=self.rank(out_features, in_features), factor_bits=bits)

    def rank(self, out_features: int, in_features: int) -> int:
        """Rank for a layer of this shape."""
        side = min(out_features, in_features)
        rank = scale_rank(self.options.rank, side) if self.options.shrink else self.options.rank
        return min(rank, side)
