"""LLM-QAT (2023): all weights are trained through the rounding, on text that the model has written itself.

The loss is the cross-entropy with the original model's predictions (logit distillation), so no labels and no data are
needed. Ranges follow the largest weights, and gradients pass the rounding of weights and activations.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from qe_edge.methods.training import ModelTraining, TrainingOptions
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.trained_weights import FreeWeight, TrainedWeight


class LLMQATOptions(TrainingOptions):
    """Options of LLM-QAT.

    Attributes:
        data: Text that the model writes itself, or the calibration samples, which may have pictures.
    """

    data: Literal["generated", "calibration"] = "generated"
    rate: float = Field(3e-5, gt=0, le=1)


class LLMQAT(ModelTraining[LLMQATOptions]):
    """Data-free distillation.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="llmqat", scheme="w4a16", options={"rate": 0.01, "steps": 50})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.09  # method rtn: 0.10
        True
    """

    def trainable(self, weight: Tensor, scheme: Scheme, seed: int) -> TrainedWeight:  # noqa: ARG002 - nothing is random
        """All weights."""
        return FreeWeight(weight, scheme.weight)
