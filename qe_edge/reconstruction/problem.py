"""The linear problem: weights, number grids, and what was measured on their calibration input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qe_edge.budget.model import Choice
from qe_edge.calibration.statistics import InputStatistics
from qe_edge.numerics.matrices import Matrix
from qe_edge.numerics.schemes import Scheme
from qe_edge.system.device import CPU
from qe_edge.system.errors import NumericalError


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
