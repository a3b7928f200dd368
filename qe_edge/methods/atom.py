"""Atom (MLSys 2024): the channels of largest energy keep 8 bits, the others are rounded in small groups.

Channels are put in order of their mean square, so that neighbours in a group are alike and the largest come last. The
last channels have weights and activations of 8 bits. The other channels have the scheme's bits, with a scale for every
group of channels, of weights and of each token. GPTQ chooses the codes: the last channels make up for the errors of the
groups, exactly as if all were one matrix.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import TorchParts, fine_parts
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import PER_CHANNEL, QuantizedWeight, WeightGrid, rounds_activations
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.problem import LinearProblem

WIDTH, STEP = 4096, 32  # inputs for which the original keeps 128 channels; fewer inputs keep multiples of 32


class AtomOptions(MethodOptions):
    """Options of Atom.

    Attributes:
        channels: Channels with 8 bits in layers of 4096 inputs and more; narrower layers have fewer in proportion.
        group: Channels that share a scale, where the scheme has none of its own.
        clip: Search the range of every scale of the weights.
        damping: Damping of GPTQ's Hessian, relative to the mean of its diagonal.
    """

    channels: int = Field(128, ge=0, le=4096)
    group: int = Field(128, ge=16, le=4096)
    clip: bool = True
    damping: float = Field(0.01, gt=0, le=1)


class Atom(Method[AtomOptions]):
    """Mixed precision by channel, in groups.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers
        >>> recipe = qe_edge.make_recipe(method="atom", scheme="w4a16", options={"channels": 256})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.0075  # method rtn: 0.09
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    @property
    def torch_only(self) -> str:
        """The channels of 8 bits and the scales by group."""
        return "its channels of 8 bits, their order and activation scales by group"

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer with channels of 8 bits."""
        fine = fine_channels(in_features, self.options.channels)
        own = scheme.with_grid(self._grid(scheme.weight))
        weight = super().empty(out_features, in_features - fine, own).weight
        parts = TorchParts(
            order=torch.empty(in_features, dtype=torch.int32, device="meta"),
            fine_codes=torch.empty(out_features, fine, dtype=torch.int8, device="meta") if fine else None,
            fine_scale=torch.empty(out_features, dtype=torch.float16, device="meta") if fine else None,
        )
        return QuantizedLinear(weight, scheme.activation_bits, parts=parts)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Order the channels, then round."""
        gram, grid = torch.from_numpy(problem.gram()).double(), self._grid(problem.scheme.weight)
        order = gram.diagonal().argsort(stable=True)
        fine = fine_channels(len(order), self.options.channels)
        ordered = gram[order][:, order]
        energies = ordered.diagonal()
        damped = ordered + torch.diag(self.options.damping * energies.mean() + (energies == 0).double())
        weight, last = round_in_order(problem.weight[:, order], damped, fine, grid, clip=self.options.clip)
        groups = weight.group_size if rounds_activations(problem.scheme.activation_bits) else PER_CHANNEL
        parts = TorchParts(order=order.int(), activation_group=groups, **(fine_parts(last) if fine else {}))
        return QuantizedLinear(weight, problem.scheme.activation_bits, parts=parts)

    def _grid(self, grid: WeightGrid) -> WeightGrid:
        """The scheme's grid, in groups."""
        return replace(grid, group_size=self.options.group) if grid.group_size == PER_CHANNEL else grid


def fine_channels(in_features: int, channels: int) -> int:
    """How many of a layer's inputs keep 8 bits: a multiple of 32, at most half of them.

    Example:
        >>> fine_channels(4096, channels=128), fine_channels(768, channels=128)
        (128, 32)
    """
    wanted = min(channels, -(-channels * in_features // (WIDTH * STEP)) * STEP)
    return min(wanted, in_features // 2 // STEP * STEP)


def round_in_order(
    weight: Tensor, gram: Tensor, fine: int, grid: WeightGrid, *, clip: bool
) -> tuple[QuantizedWeight, Tensor]:
    """Codes of all columns but the last `fine`, and the last columns `[out, fine]`, which make up for the errors.

    The last columns are free while the others are rounded, so the Hessian of the others is its Schur complement.

    Args:
        weight: `[out, in]` float32.
        gram: `[in, in]` float64, positive definite.
        fine: Number of columns at the end, which the caller rounds.
        grid: Grid of the codes.
        clip: Search the range of every scale.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(8, 64)
        >>> codes, last = round_in_order(weight, torch.eye(64).double(), fine=32, grid=WeightGrid(4), clip=False)
        >>> tuple(codes.codes.shape), tuple(last.shape)
        ((8, 32), (8, 32))
    """
    kept = weight.shape[1] - fine
    shares = torch.linalg.solve(gram[kept:, kept:], gram[kept:, :kept])  # `[fine, kept]`
    hessian = gram[:kept, :kept] - gram[:kept, kept:] @ shares
    codes = gptq_round(weight[:, :kept].contiguous(), (hessian + hessian.T).numpy() / 2, grid, 0.0, clip=clip)
    error = weight[:, :kept].double() - codes.decode().double()
    return codes, (weight[:, kept:].double() + error @ shares.T).float()
