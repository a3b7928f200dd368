"""ASER (AAAI 2025): whitened low-rank reconstruction with activation smoothing, the parent of QE's shared expert."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.static import StaticCorrection, StaticOptions
from qe_edge.reconstruction.branches import leave_out_channels, static_correction
from qe_edge.reconstruction.directions import whitened_directions
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.ranks import scale_rank


class ASEROptions(StaticOptions):
    """Options of ASER.

    Attributes:
        outliers: Channels that are left to the low-rank branch (f in the paper); 0 is ASER without smoothing.
    """

    outliers: int = Field(32, ge=0, le=1024)


class ASER(StaticCorrection[ASEROptions]):
    """Optimal low-rank correction under the input's Gram matrix. The main branch divides outlier channels down.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers
        >>> recipe = qe_edge.make_recipe(method="aser", scheme="w4a16", options={"outliers": 8})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.027  # method rtn: 0.09
        True
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "plain": {"outliers": 0}}

    @property
    def needs(self) -> StatisticsRequest | None:
        """Channel means and the Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Leave the outlier channels out, round, correct."""
        abs_mean = problem.measured().abs_mean
        count = self.options.outliers
        if self.options.shrink:
            count = scale_rank(count, min(problem.weight.shape))
        importance = abs_mean * problem.weight.abs().mean(0).double().numpy()
        outliers = np.argsort(-importance, kind="stable")[: min(count, len(importance))]
        outliers = outliers[importance[outliers] > 0]  # no input, no outlier
        branch = leave_out_channels(problem.weight, problem.scheme.weight, outliers, abs_mean, "scale")
        directions = whitened_directions(branch.error, problem.gram(), self.rank(*problem.weight.shape))
        adapters = static_correction(branch.error, directions, self.options.adapter_dtype)
        return QuantizedLinear(branch.weight, problem.scheme.activation_bits, branch.inv_omega, adapters)
