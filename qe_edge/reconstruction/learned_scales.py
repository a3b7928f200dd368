"""Channel scales that gradients find, through the rounding of weights and activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qe_edge.numerics.channel_scales import LARGEST_SCALE, storable_inverse
from qe_edge.numerics.grids import MIN_RANGE, fake_quantize_activation, quantize_weight, rounds_activations
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.ranges import Ranges, round_through

MOMENTS = (0.9, 0.999)
BATCH = 256  # tokens of a step
CHECKS = 4  # times that a scale is judged on all tokens while it is learned


@dataclass(frozen=True)
class ScaleLearning:
    """How a scale is learned.

    Attributes:
        steps: Steps of Adam on the scale's logarithm, each on a few hundred tokens.
        rate: Their rate.
        power: Of the output's errors whose mean falls: 1 for absolute, 2 for square errors.
        seed: Of the order of the tokens.
    """

    steps: int
    rate: float
    power: Literal[1, 2]
    seed: int


def output_error(weight: Tensor, tokens: Tensor, inverse: Tensor, scheme: Scheme, power: int) -> float:
    """Mean `|error|^power` of a linear's outputs with both quantizers.

    Args:
        weight: `[out, in]` float32.
        tokens: `[n, in]` float32.
        inverse: `[in]` float16, as the layer multiplies its input.
        scheme: Grids of weights and activations.
        power: 1 or 2.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> weight, tokens = 7 * torch.ones(2, 4), 127 * torch.ones(3, 4)  # what both grids hold exactly
        >>> output_error(weight, tokens, torch.ones(4).half(), get_scheme("w4a8"), power=1)
        0.0
    """
    codes = quantize_weight(weight / inverse.float(), scheme.weight).decode()
    total, chunk = 0.0, 4 * BATCH
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        x = fake_quantize_activation(part * inverse.float(), scheme.activation_bits)
        error = (x @ codes.T).sub_(part @ weight.T).abs_()
        total += float((error if power == 1 else error.square_()).sum(dtype=torch.float64))
    return total / (max(len(tokens), 1) * len(weight))


def learn_inverse(
    weight: Tensor, tokens: Tensor, scheme: Scheme, starts: Sequence[np.ndarray], learning: ScaleLearning
) -> Tensor:
    """The factor `[in]` float16 on a linear's input whose output error is least of all that were judged.

    Args:
        weight: `[out, in]` float32.
        tokens: `[n, in]` float32, at least one.
        scheme: Grids of weights and activations.
        starts: Scales `[in]` that are judged first; learning begins at the best of them.
        learning: How.

    Example:
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> weight, tokens = torch.randn(8, 16), torch.randn(50, 16)
        >>> learn_inverse(weight, tokens, get_scheme("w4a8"), [np.ones(16)], ScaleLearning(8, 0.01, 2, seed=0)).shape
        torch.Size([16])
    """
    judged = [(output_error(weight, tokens, inverse, scheme, learning.power), inverse)
              for inverse in map(storable_inverse, starts)]  # fmt: skip
    least, best = min(judged, key=lambda one: one[0])
    if not least > 0:  # inputs or weights that are all zero
        return best
    logarithm = (-best.float().log()).requires_grad_()
    optimizer = torch.optim.Adam([logarithm], lr=learning.rate, betas=MOMENTS)
    drawn = torch.Generator().manual_seed(learning.seed)
    every = max(1, learning.steps // CHECKS)
    for step in range(1, learning.steps + 1):
        rows = torch.randint(len(tokens), (min(BATCH, len(tokens)),), generator=drawn)
        with torch.enable_grad():
            error = _soft_error(weight, tokens[rows], logarithm, scheme)
            loss = (error.abs() if learning.power == 1 else error.square()).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss / least)
        optimizer.step()
        with torch.no_grad():
            logarithm.clamp_(-math.log(LARGEST_SCALE), math.log(LARGEST_SCALE))
        if step % every == 0 or step == learning.steps:
            inverse = storable_inverse(logarithm.detach().double().exp().numpy())
            error_now = output_error(weight, tokens, inverse, scheme, learning.power)
            if error_now < least:
                least, best = error_now, inverse
    return best


def _soft_error(weight: Tensor, tokens: Tensor, logarithm: Tensor, scheme: Scheme) -> Tensor:
    """Error of the outputs `[n, out]`, differentiable in the logarithm `[in]` of the scale."""
    scale = logarithm.exp()
    ranges = Ranges.of(weight * scale, scheme.weight)
    decoded = ranges.soft_decoded(torch.ones(*ranges.groups.shape[:2], 2))
    x = tokens / scale
    if rounds_activations(scheme.activation_bits):
        largest = 2 ** (scheme.activation_bits - 1) - 1
        step = x.abs().amax(-1, keepdim=True).clamp_min(MIN_RANGE) / largest
        x = round_through(x / step) * step
    return x @ decoded.T - tokens @ weight.T
