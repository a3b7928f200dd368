"""Binary weights in fine groups, by EM under the Hessian (Song et al., Findings of ACL 2025).

A weight is a sign and the number of its fine group, `c_g + s h_g` with a centre and a half distance for every fine
group: with b bits, of which one is the sign, the 2^b values of an output channel (or of a scheme's group in it) are
free. They are found by expectation and maximization on the weights, each weighed by its saliency `1 / [H^-1]_cc`: the E
step gives every weight the nearest value, the M step puts every value at the weighed mean of its weights. Columns are
then rounded one after the other, and later ones make up for the error of each, as in GPTQ.

The original has one bit for the sign and one for the fine group, and activations of 4 bits as four binary planes. A
scheme's activations are planes of the same kind: 8 or 6 binary matrices with scales that are powers of two.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import TorchParts
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import PER_CHANNEL, SCALE_DTYPE, QuantizedWeight, WeightGrid
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.second_order import inverse_factor

BLOCK = 128  # columns whose updates are applied to the rest at once


class BWAOptions(MethodOptions):
    """Options of binary weights in fine groups.

    Attributes:
        rounds: Of expectation and maximization.
        damping: Of the Hessian, relative to the mean of its diagonal.
    """

    rounds: int = Field(20, ge=0, le=1000)
    damping: float = Field(0.01, gt=0, le=1)


class BWA(Method[BWAOptions]):
    """Free values by EM, and second-order rounding to them.

    Example:
        >>> import qe_edge
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> layer = qe_edge.quantize_linear(weight, tokens, qe_edge.make_recipe(method="bwa", scheme="w3a8"))
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.09  # method gptq: 0.13
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    @property
    def torch_only(self) -> str:
        """The values."""
        return "its free values of every output channel"

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer with its values."""
        plain = super().empty(out_features, in_features, scheme)
        bits, size = plain.weight.bits, plain.weight.group_size
        scales = torch.empty(out_features, _groups(in_features, size) * 2**bits, dtype=SCALE_DTYPE, device="meta")
        weight = QuantizedWeight(plain.weight.codes, scales, None, bits, size)
        return QuantizedLinear(weight, scheme.activation_bits, parts=TorchParts(codebook="levels"))

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Find the values of every group when its turn comes, and round to them."""
        energies = torch.from_numpy(problem.gram()).diagonal()
        dead = (energies == 0) & energies.any()  # inputs that are all zero say nothing of any channel
        factor = inverse_factor(problem.gram(), self.options.damping)
        kept = problem.weight.masked_fill(dead, 0.0)
        weight = level_round(kept, factor, problem.scheme.weight, self.options.rounds)
        return QuantizedLinear(weight, problem.scheme.activation_bits, parts=TorchParts(codebook="levels"))


def level_round(weight: Tensor, factor: Tensor, grid: WeightGrid, rounds: int) -> QuantizedWeight:
    """Codes of free values, column by column.

    Args:
        weight: `[out, in]` float32.
        factor: `[in, in]` upper Cholesky factor of the Hessian's inverse.
        grid: Its bits and groups; its range is not used.
        rounds: Of expectation and maximization.

    Example:
        >>> weight = torch.tensor([[3.0, 3.1, -5.0, 0.5, 3.0, -5.0]])
        >>> level_round(weight, torch.eye(6).double(), WeightGrid(2), rounds=10).scales
        tensor([[-5.0000,  0.5000,  3.0000,  3.0996]], dtype=torch.float16)
    """
    w, saliency = weight.double(), 1 / factor.diagonal().square()
    size = grid.resolve_group(w.shape[1])
    width = w.shape[1] if size == PER_CHANNEL else size
    codes, found = torch.zeros_like(w, dtype=torch.long), []
    for start in range(0, w.shape[1], width):
        group = slice(start, start + width)
        found.append(em_levels(w[:, group], saliency[group], grid.bits, rounds))
        levels = found[-1].double()
        for first in range(start, start + width, BLOCK):
            block = slice(first, min(first + BLOCK, start + width))
            errors = torch.zeros_like(w[:, block])
            for column in range(block.start, block.stop):
                codes[:, column] = nearest_level(w[:, column : column + 1], levels)[:, 0]
                rounded = levels.gather(1, codes[:, column : column + 1])[:, 0]
                error = (w[:, column] - rounded) / factor[column, column]
                errors[:, column - first] = error
                w[:, column : block.stop] -= torch.outer(error, factor[column, column : block.stop])
            w[:, block.stop :] -= errors @ factor[block, block.stop :]
    packable = torch.where(codes >= 2 ** (grid.bits - 1), codes - 2**grid.bits, codes).to(torch.int8)
    return QuantizedWeight(packable, torch.cat(found, 1), None, grid.bits, size)


def em_levels(weight: Tensor, saliency: Tensor, bits: int, rounds: int) -> Tensor:
    """The `2^bits` values `[out, 2^bits]` float16 of every row, ascending, by weighed expectation and maximization.

    It begins at even steps over the range and at even shares of the weights; every row keeps the better end.

    Args:
        weight: `[out, width]` float64.
        saliency: `[width]` float64, of every column's squared error.
        bits: Of a code.
        rounds: Of expectation and maximization.

    Example:
        >>> weight = torch.tensor([[0.0, 0.2, 5.0, 7.0]]).double()
        >>> em_levels(weight, torch.tensor([1.0, 1.0, 1.0, 3.0]).double(), bits=1, rounds=5)
        tensor([[0.1000, 6.5000]], dtype=torch.float16)
    """
    count = 2**bits
    share = (torch.arange(count).double() + 0.5) / count
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    best, least = torch.zeros(len(weight), count, dtype=SCALE_DTYPE), torch.full((len(weight), 1), torch.inf).double()
    for start in (low + (high - low) * torch.arange(count) / (count - 1), weight.quantile(share, dim=1).T):
        levels = start.contiguous()
        for _ in range(rounds):
            chosen = nearest_level(weight, levels)
            total = torch.zeros_like(levels).scatter_add_(1, chosen, saliency.expand_as(weight))
            moment = torch.zeros_like(levels).scatter_add_(1, chosen, saliency * weight)
            levels = torch.where(total > 0, moment / total, levels).sort(1).values
        stored = levels.to(SCALE_DTYPE)
        rounded = stored.double().gather(1, nearest_level(weight, stored.double()))
        lost = ((weight - rounded).square() * saliency).sum(1, keepdim=True)
        best, least = torch.where(lost < least, stored, best), torch.minimum(lost, least)
    return best


def nearest_level(weight: Tensor, levels: Tensor) -> Tensor:
    """Number `[out, n]` of the value nearest to every weight `[out, n]`, of ascending `levels` `[out, count]`.

    Example:
        >>> nearest_level(torch.tensor([[0.2, 0.9, 7.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([[0, 1, 1]])
    """
    between = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(between.contiguous(), weight.contiguous())


def _groups(in_features: int, size: int) -> int:
    return 1 if size == PER_CHANNEL else in_features // size
