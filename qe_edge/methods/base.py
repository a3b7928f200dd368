"""What every quantization method receives and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from qe_edge.calibration.statistics import InputStatistics, StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.numerics.grids import WeightGrid
from qe_edge.numerics.matrices import Matrix
from qe_edge.numerics.schemes import Scheme
from qe_edge.system.device import CPU
from qe_edge.system.errors import NumericalError


class MethodOptions(BaseModel):
    """Base of a method's own options; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class AdapterSize:
    """The low-rank correction that a method is going to give a layer; what a dry run predicts sizes from.

    Attributes:
        rank_shared: Rank of the shared expert.
        rank_routed: Rank of every routed expert.
        experts: Number of routed experts.
        factor_bits: Bits of one stored number of the factors.
    """

    rank_shared: int = 0
    rank_routed: int = 0
    experts: int = 0
    factor_bits: int = 16


@dataclass(frozen=True)
class Choice:
    """What a budget gives one linear problem.

    Attributes:
        adapters: Its low-rank correction.
        left_out: Important channels that the main branch leaves to it.
        grid: Of the weight's codes.
    """

    adapters: AdapterSize
    left_out: int
    grid: WeightGrid


@dataclass(frozen=True)
class Candidate:
    """One choice with what it costs and what it leaves.

    Attributes:
        choice: The choice.
        loss: Mean square error of the layer's output, summed over its channels, per calibration token.
        stored: Bits of the whole layer in a checkpoint.
        read: Bits that one decoded token reads.
    """

    choice: Choice
    loss: float
    stored: float
    read: float


@dataclass(frozen=True)
class LinearProblem:
    """One linear layer to quantize, or several stacked siblings that read the same input.

    Attributes:
        name: Dotted name of the layer, for messages.
        weight: `[out, in]` float32.
        scheme: Number grids of weights and activations.
        statistics: What was measured on the layer's calibration input, or None if the method asked for nothing.
        seed: Seed of everything random in this layer.
        choice: What a budget gives it; None where the method's own options decide.
        modality_ratio: Weight of an error on image tokens where one on answer tokens has weight 1; other than 1 only
            for methods that ask for gradients.
        device: Where the weight, the Gram matrix and the tokens are, and the result is made; other than the CPU only
            for methods that compute `on_device`.
    """

    name: str
    weight: Tensor
    scheme: Scheme
    statistics: InputStatistics | None
    seed: int
    choice: Choice | None = None
    modality_ratio: float = 1.0
    device: torch.device = CPU

    def given(self, choice: Choice) -> LinearProblem:
        """The same problem with what a budget gives it."""
        return replace(self, choice=choice)

    def measured(self) -> InputStatistics:
        """The statistics of a method that asked for some.

        Raises:
            NumericalError: If nothing was measured.
        """
        if self.statistics is None:
            raise NumericalError(f"'{self.name}' has no calibration statistics.", "Pass calibration tokens.")
        return self.statistics

    def gram(self) -> Matrix:
        """The Gram matrix `[in, in]` of a method that asked for it.

        Raises:
            NumericalError: If it was not measured.
        """
        gram = self.measured().gram
        if gram is None:
            raise NumericalError(f"'{self.name}' has no Gram matrix.", "Pass calibration tokens.")
        return gram


class Method(ABC):
    """A quantization method with its resolved options.

    Class attributes:
        Options: The pydantic model of the method's options.
        presets: Named sets of option values; "default" always exists.
        on_device: Whether problems may lie on a device; others are brought to the CPU's memory.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    on_device: ClassVar[bool] = False

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    @property
    def stack_siblings(self) -> bool:
        """Whether layers that read the same input are handed over as one stacked problem."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of the loss are to be measured on the original model before the first layer."""
        return False

    def adapter_size(self, out_features: int, in_features: int) -> AdapterSize:  # noqa: ARG002 - for subclasses
        """Ranks and experts for a layer of this shape, as far as they are known before calibration; none by default."""
        return AdapterSize()

    def rotates(self, modules: Sequence[str], *, budget: bool) -> bool:  # noqa: ARG002 - for subclasses
        """Whether the language model is rotated before anything is measured on it (`models.rotation`).

        Args:
            modules: Those that are quantized.
            budget: Whether a budget is spent.
        """
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

    @property
    def spends_budget(self) -> bool:
        """Whether the method offers candidates for a bit budget."""
        return type(self).candidates is not Method.candidates

    def candidates(self, problem: LinearProblem) -> list[Candidate]:
        """Everything that a budget may choose from for one linear problem; only where `spends_budget`."""
        raise NotImplementedError(f"'{problem.name}': this method has no candidates")
