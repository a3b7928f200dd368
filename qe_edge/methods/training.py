"""What the methods that train a whole model share: steps, and the training of one layer alone."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import fake_quantize_activation, quantize_weight
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.trained_weights import TrainedWeight, train_on_outputs


class TrainingOptions(MethodOptions):
    """Options of training.

    Attributes:
        steps: Steps of the optimizer.
        rate: Learning rate of the first step; it falls to zero in a line.
        batch: Samples of a step.
        data: Text that the model writes itself ("generated"), or the calibration samples.
        generated: Number of texts that the model writes.
        length: Their length in tokens.
        tokens: Size of the token sample of a layer that is trained alone.
    """

    steps: int = Field(200, ge=1, le=100_000)
    rate: float = Field(3e-5, gt=0, le=1)
    batch: int = Field(8, ge=1, le=1024)
    data: Literal["generated", "calibration"] = "calibration"
    generated: int = Field(128, ge=1, le=100_000)
    length: int = Field(64, ge=8, le=4096)
    tokens: int = Field(2048, ge=1, le=1 << 20)


TrainingType = TypeVar("TrainingType", bound=TrainingOptions)


class ModelTraining(Method[TrainingType]):
    """A method that trains all layers of a model together; in `quantize_linear` one layer on its own outputs.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> from qe_edge.reconstruction.trained_weights import FreeWeight
        >>> class Free(ModelTraining[TrainingOptions]):
        ...     def trainable(self, weight: Tensor, scheme: Scheme, seed: int) -> TrainedWeight:
        ...         return FreeWeight(weight, scheme.weight)
        >>> Free(TrainingOptions()).trainable(torch.tensor([[0.6, 7.0]]), get_scheme("w4a8"), seed=0).stored().codes
        tensor([[1, 7]], dtype=torch.int8)
    """

    @property
    def trains_model(self) -> bool:
        """It is the method."""
        return True

    @property
    def needs(self) -> StatisticsRequest | None:
        """A token sample, where a layer is alone."""
        return StatisticsRequest(gram=False, tokens=self.options.tokens)

    @abstractmethod
    def trainable(self, weight: Tensor, scheme: Scheme, seed: int) -> TrainedWeight:
        """A layer's weight `[out, in]` float32 with the parameters that are trained."""

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Train one layer on its own outputs; plain rounding where that is no worse."""
        weight, bits = problem.weight, problem.scheme.activation_bits
        tokens = torch.from_numpy(problem.measured().tokens)
        trained, options = self.trainable(weight, problem.scheme, problem.seed), self.options
        train_on_outputs(trained, weight, tokens, bits, options.steps, options.rate)
        rounded = fake_quantize_activation(tokens, bits)
        candidates = [quantize_weight(weight, problem.scheme.weight), trained.stored()]
        lost = [float((rounded @ codes.decode().T - tokens @ weight.T).square().sum()) for codes in candidates]
        return QuantizedLinear(candidates[lost[1] < lost[0]], bits)
