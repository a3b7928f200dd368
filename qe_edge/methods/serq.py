"""SERQ (ICLR 2026): channel scales flatten the activations, and the most salient channels carry their error back.

`y = W_q Q_a(x / s) + R x_S`. `S` holds the channels whose rounding error costs most on calibration tokens, and the
single matrix `R` `[out, r]` holds this error. In our operator `x_S` is a low-rank branch whose down factor has a one in
every row. The original permutes the weights offline, so that the channels lie side by side.

Written from the paper's abstract and summaries, not from its code.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import Adapters, QuantizedLinear
from qe_edge.methods.smoothquant import smoothing_scale
from qe_edge.methods.static import StaticCorrection, StaticOptions
from qe_edge.numerics.channel_scales import storable_inverse
from qe_edge.numerics.grids import quantize_weight
from qe_edge.reconstruction.factors import store_factor
from qe_edge.reconstruction.problem import LinearProblem


class SERQOptions(StaticOptions):
    """Options of SERQ.

    Attributes:
        alpha: Share of the activations' range that moves to the weights.
    """

    alpha: float = Field(0.5, ge=0, le=1)


class SERQ(StaticCorrection[SERQOptions]):
    """Flattened activations, and one matrix for the error of salient channels.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers
        >>> recipe = qe_edge.make_recipe(method="serq", scheme="w4a16", options={"alpha": 0.5})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.074  # method rtn: 0.09
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """Channel maxima and the Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Scale, round, choose the channels, and give them their error back."""
        largest = problem.weight.abs().amax(0).double().numpy()
        inverse = storable_inverse(smoothing_scale(problem.measured().abs_max, largest, self.options.alpha))
        codes = quantize_weight(problem.weight / inverse.float(), problem.scheme.weight)
        error = (problem.weight - codes.decode() * inverse.float()).double().numpy()
        channels = salient_channels(error, np.diag(problem.gram()), self.rank(*problem.weight.shape))
        return QuantizedLinear(codes, problem.scheme.activation_bits, inverse, self._adapters(error, channels))

    def _adapters(self, error: np.ndarray, channels: np.ndarray) -> Adapters | None:
        """The matrix `[out, r]` and the choice of its channels, as factors of a shared expert."""
        if not len(channels):
            return None
        chosen = torch.zeros(len(channels), error.shape[1])
        chosen[torch.arange(len(channels)), torch.from_numpy(channels)] = 1.0
        down = store_factor(chosen, self.options.adapter_dtype)
        up = store_factor(error[:, channels], self.options.adapter_dtype)
        return Adapters(down.codes, up.codes, down.scale, up.scale, len(channels), 0, 0, None)


def salient_channels(error: np.ndarray, energies: np.ndarray, count: int) -> np.ndarray:
    """The input channels, in order, whose error costs most: `E[x_c^2] sum_o E_oc^2`.

    Args:
        error: `[out, in]` of the weight.
        energies: `[in]` mean square of every input.
        count: Number of channels; channels without input or error do not count.

    Example:
        >>> error = np.array([[0.1, 0.2, 0.0], [0.1, 0.2, 0.0]])
        >>> salient_channels(error, energies=np.array([100.0, 1.0, 50.0]), count=1)
        array([0])
    """
    cost = energies * np.square(error).sum(0)
    chosen = np.argsort(-cost, kind="stable")[:count]
    return np.sort(chosen[cost[chosen] > 0])
