"""What every quantization method receives and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qe_edge.calibration.statistics import InputStatistics, StatisticsRequest
from qe_edge.linear import QuantizedLinear
from qe_edge.schemes import Scheme


class MethodOptions(BaseModel):
    """Base of a method's own options; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class LinearProblem:
    """One linear layer to quantize, or several stacked siblings that read the same input.

    Attributes:
        name: Dotted name of the layer, for messages.
        weight: `[out, in]` float32.
        scheme: Number grids of weights and activations.
        statistics: What was measured on the layer's calibration input, or None if the method asked for nothing.
        seed: Seed of everything random in this layer.
    """

    name: str
    weight: Tensor
    scheme: Scheme
    statistics: InputStatistics | None
    seed: int


class Method(ABC):
    """A quantization method with its resolved options.

    Class attributes:
        Options: The pydantic model of the method's options.
        presets: Named sets of option values; "default" always exists.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    @property
    def stack_siblings(self) -> bool:
        """Whether layers that read the same input are handed over as one stacked problem."""
        return False

    @abstractmethod
    def request(self, out_features: int, in_features: int) -> StatisticsRequest | None:
        """What to measure on the calibration input of a layer of this shape; None for no calibration."""

    @abstractmethod
    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Quantize one linear problem.

        Raises:
            NumericalError: If weights or statistics are not finite.
        """
