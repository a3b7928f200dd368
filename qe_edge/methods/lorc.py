"""LoRC (ZeroQuant-V2): plain low-rank reconstruction of the weight error, without calibration."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.static import StaticCorrection, StaticOptions
from qe_edge.reconstruction.branches import leave_out_channels, static_correction
from qe_edge.reconstruction.directions import diagonal_directions
from qe_edge.reconstruction.problem import LinearProblem


class LoRC(StaticCorrection[StaticOptions]):
    """Truncated SVD of the error; the preset "paper" has the original's rank 8.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="lorc", scheme="w4a16", options={"rank": 16})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.093  # method rtn: 0.10
        True
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "paper": {"rank": 8, "shrink": False}}

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round, then correct the rounding error."""
        ones = np.ones(problem.weight.shape[1])
        branch = leave_out_channels(problem.weight, problem.scheme.weight, np.zeros(0, np.int64), ones, "drop")
        directions = diagonal_directions(branch.error, ones, self.rank(*problem.weight.shape))
        adapters = static_correction(branch.error, directions, self.options.adapter_dtype)
        return QuantizedLinear(branch.weight, problem.scheme.activation_bits, None, adapters)
