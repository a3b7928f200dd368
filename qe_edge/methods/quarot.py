"""QuaRot (NeurIPS 2024): the residual stream and the values of every head are rotated, so that no channel stands out.

Before the first layer is quantized the language model is rotated offline, in float64: a random Hadamard matrix `R1` on
the residual stream (embedding, every layer that reads or writes the stream, head; gains of the norms are folded into
the layers after them; a vision-language model's merger writes rotated features), and a Hadamard matrix `R2` per head on
values and output projection. The model computes the same as before, up to the rounding of its own precision, and
needs no new operator. Then the weights are rounded, by GPTQ with searched ranges as in the original, or to nearest.

Different: a head that shares the embedding gets one small matrix in front of it instead of a weight of its own
(`models.rotation`); sizes with an odd factor take a Hartley transform for it in place of tabulated Hadamard matrices.
Not built: the online Hadamard transforms of the MLP's inner activations and of queries and keys, which need an operator
of their own, so the input of `down_proj` is not rotated; quantized KV caches; clipped activation ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.rounding import Rounding


class QuaRotOptions(MethodOptions):
    """Options of QuaRot.

    Attributes:
        rounding: Rule that rounds the rotated weights.
        clip: Search the range of every scale.
        damping: Damping of GPTQ's Hessian, relative to the mean of its diagonal.
    """

    rounding: Literal["gptq", "nearest"] = "gptq"
    clip: bool = True
    damping: float = Field(0.01, gt=0, le=1)


class QuaRot(Method[QuaRotOptions]):
    """Rotation of the whole language model, then rounding; the preset "rtn" rounds to nearest in the whole range.

    Example:
        >>> method = QuaRot(QuaRotOptions(rounding="nearest", clip=False))
        >>> method.rotates(["language"], budget=False), method.needs  # qe_edge.quantize rotates the model first
        (True, None)
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}, "rtn": {"rounding": "nearest", "clip": False}}
    on_device: ClassVar[bool] = True

    def rotates(self, modules: Sequence[str], *, budget: bool) -> bool:  # noqa: ARG002 - it is the method
        """Always."""
        return True

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix, unless weights are rounded to nearest in their whole range."""
        if self.options.rounding == "nearest" and not self.options.clip:
            return None
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Round the weight of `problem`, which is already rotated."""
        rounding = Rounding(self.options.rounding, self.options.clip, self.options.damping)
        gram = problem.gram() if self.request(*problem.weight.shape) else None
        weight, _ = rounding(problem.weight, problem.scheme.weight, gram, np.ones(problem.weight.shape[1]))
        return QuantizedLinear(weight, problem.scheme.activation_bits)
