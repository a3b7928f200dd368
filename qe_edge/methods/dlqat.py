"""DL-QAT (EMNLP 2024): a low-rank update of the weights and a magnitude for every scale group are trained.

`m s round((W + B A) / s)`: the factors move weights on the grid of the first scales `s`, and the magnitudes `m` move
whole groups. Less than a hundredth of a large model's parameters are trained. The factors are merged before anything is
stored: only codes and scales are left.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from qe_edge.methods.training import ModelTraining, TrainingOptions
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.trained_weights import LowRankWeight, TrainedWeight


class DLQATOptions(TrainingOptions):
    """Options of DL-QAT.

    Attributes:
        rank: Of the update of a layer's weights.
        rate: Learning rate of the first step.
    """

    rank: int = Field(16, ge=1, le=1024)
    rate: float = Field(1e-3, gt=0, le=1)


class DLQAT(ModelTraining[DLQATOptions]):
    """Low-rank training through the rounding.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="dlqat", scheme="w4a16", options={"rate": 0.01, "steps": 50})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.09  # method rtn: 0.10
        True
    """

    def trainable(self, weight: Tensor, scheme: Scheme, seed: int) -> TrainedWeight:
        """The factors and magnitudes."""
        return LowRankWeight(weight, scheme.weight, min(self.options.rank, *weight.shape), seed)
