"""MBQ (CVPR 2025): AWQ's channel scales, searched with image and answer tokens weighed by the gradients of the loss.

The search minimises the mean absolute output error of the layers that read the input; the original takes the output of
their attention or MLP module. The error is measured on a sample of the calibration tokens, with quantized activations
where the scheme has them. The scale is an operand of our layer, so every linear can have one. Prompt text has weight
zero, as in the original. A layer that sees no image and no answer token weighs all tokens alike.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.sensitivity import ANSWER, IMAGE
from qe_edge.calibration.statistics import InputStatistics, StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.methods.awq import AWQOptions
from qe_edge.methods.scaling import ChannelScaling
from qe_edge.numerics.channel_scales import power_scale, storable_inverse
from qe_edge.numerics.grids import fake_quantize_activation, quantize_weight
from qe_edge.reconstruction.problem import LinearProblem


class MBQOptions(AWQOptions):
    """Options of MBQ.

    Attributes:
        tokens: Size of the token sample that the error is measured on.
    """

    tokens: int = Field(4096, ge=1, le=1 << 20)


class MBQ(ChannelScaling[MBQOptions]):
    """Channel scales for the loss `(sum_answer |dy| + lambda sum_image |dy|) / entries`.

    Example:
        >>> method = MBQ(MBQOptions(tokens=1024))
        >>> method.needs.tokens, method.needs_gradients  # qe_edge.quantize measures both on the model
        (1024, True)
    """

    needs_gradients: ClassVar[bool] = True  # lambda comes from them

    @property
    def needs(self) -> StatisticsRequest | None:
        """Channel means and a token sample."""
        return StatisticsRequest(gram=False, tokens=self.options.tokens)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Search the scale, then round."""
        measured = problem.measured()
        tokens, weighing = weigh_tokens(measured, problem.modality_ratio)
        target = tokens @ problem.weight.T
        best: tuple[float, QuantizedLinear] | None = None
        for step in range(self.options.grid):
            inverse = storable_inverse(power_scale(measured.abs_mean, step / self.options.grid))
            codes = quantize_weight(problem.weight / inverse.float(), problem.scheme.weight)
            x = fake_quantize_activation(tokens * inverse.float(), problem.scheme.activation_bits)
            error = (x @ codes.decode().T).sub_(target).abs_().sum(1, dtype=torch.float64)
            loss = float(error @ weighing)
            if best is None or loss < best[0]:
                best = loss, QuantizedLinear(codes, problem.scheme.activation_bits, inverse)
        if best is None:
            raise ValueError("grid must be positive")
        return best[1]


def weigh_tokens(measured: InputStatistics, ratio: float) -> tuple[Tensor, Tensor]:
    """The sampled tokens that count, `[n, in]` float32, and their weights `[n]` float64: images `ratio`, answers 1.

    Example:
        >>> from qe_edge.calibration.statistics import StatisticsCollector
        >>> collector = StatisticsCollector("mlp", 4, [torch.ones(2, 4)], StatisticsRequest(), seed=0)
        >>> collector.update(torch.ones(4, 4), torch.tensor([IMAGE, IMAGE, 0, ANSWER], dtype=torch.int8))
        >>> (measured,) = collector.finish()
        >>> tokens, weights = weigh_tokens(measured, ratio=0.25)
        >>> tuple(tokens.shape), weights.tolist()  # prompt text has no weight
        ((3, 4), [0.25, 0.25, 1.0])
    """
    kinds = measured.token_kind
    weights = np.where(kinds == IMAGE, ratio, (kinds == ANSWER).astype(np.float64))
    if not weights.any():
        return torch.from_numpy(measured.tokens), torch.ones(len(measured.tokens), dtype=torch.float64)
    counted = weights > 0
    return torch.from_numpy(measured.tokens[counted]), torch.from_numpy(weights[counted])
