"""The linear problem: weights, number grids, and statistics of their calibration input."""

from __future__ import annotations

from collections.abc import Sequence
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
class Drift:
    """How the original model differs from the quantized one at a layer that reads `X'` there, per token.

    Attributes:
        inputs: `[in, in]` float64, `(X - X')^T X'`, X the layer's input in the original.
        residual: `[out, in]` float64, `(R - R')^T X'`, R the residual stream that the layer's output is added to; None
            where it is added to none.
    """

    inputs: Tensor
    residual: Tensor | None

    def scaled(self, factors: Tensor | None) -> Drift:
        """The same for a weight whose rows are scaled by `factors` `[out]`."""
        if factors is None or self.residual is None:
            return self
        return Drift(self.inputs, self.residual * factors.double().unsqueeze(1))


@dataclass(frozen=True)
class HeadGrams:
    """What an error of a query, key or value layer does to the attention that reads its output, head by head.

    Attributes:
        count: Number of heads that the layer's outputs are, of the same width each.
        outputs: `[heads, width, width]` float64 of a query or key layer: the Gram matrix of what its outputs meet in
            the scores, carried back through rotary embeddings and norms, per token. None for a value layer.
        inputs: For every head `[in, in]`, the Gram matrix of a value layer's inputs as the attention mixes them, per
            token; empty for others.
    """

    count: int
    outputs: Tensor | None = None
    inputs: Sequence[Tensor] = ()

    def to(self, device: torch.device) -> HeadGrams:
        """The same on a device."""
        outputs = None if self.outputs is None else self.outputs.to(device)
        return HeadGrams(self.count, outputs, [gram.to(device) for gram in self.inputs])


@dataclass(frozen=True)
class LinearProblem:
    """One linear layer to quantize, or several stacked siblings that read the same input.

    Attributes:
        name: Dotted name of the layer, for messages.
        weight: `[out, in]` float32.
        scheme: Number grids of weights and activations.
        statistics: Statistics of the layer's calibration input, or None if the method asked for none.
        seed: Seed of all random numbers of this layer.
        choice: Sizes that a budget gives it; None where the method's own options decide.
        modality_ratio: Weight of an error on an image token. An error on an answer token has weight 1. It differs from
            1 only for methods that ask for gradients.
        device: Device of the weight, the Gram matrix, the tokens and the result. It differs from the CPU only for
            methods that compute `on_device`.
        drift: What the blocks and layers before have changed; None but for methods that see both models.
        heads: What errors do to the attention; None but for query, key and value layers of methods that see it.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> problem = LinearProblem("mlp", torch.ones(4, 8), get_scheme("w4a8"), statistics=None, seed=0)
        >>> problem.gram()
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: 'mlp' has no calibration statistics. Pass calibration tokens.
    """

    name: str
    weight: Tensor
    scheme: Scheme
    statistics: InputStatistics | None
    seed: int
    choice: Choice | None = None
    modality_ratio: float = 1.0
    device: torch.device = CPU
    drift: Drift | None = None
    heads: HeadGrams | None = None

    def given(self, choice: Choice) -> LinearProblem:
        """The same problem with the sizes that a budget gives it."""
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
