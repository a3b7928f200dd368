"""QBB (NeurIPS 2024): a weight is a sum of binary matrices, each with a scale per output channel.

`W^ = sum_k diag(s_k) B_k`, `B_k` of 1 and -1: as many matrices as the scheme has bits. The first matrix is the sign of
the weight, and its scale is the mean magnitude. Every next one is made in the same way from the remainder. Then two
steps alternate: all scales of an output channel are fitted together, by least squares under the input's Gram matrix,
and signs are changed where that lowers the error.

Same as the original: the bases and the greedy start. Different: closed-form fits under the Gram matrix in place of
gradient steps on the weight error. The original's last stage, which trains all scales on data that the model writes
itself, is not built.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import TorchParts
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.grids import PER_CHANNEL, SCALE_DTYPE, QuantizedWeight
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.problem import LinearProblem


class QBBOptions(MethodOptions):
    """Options of QBB.

    Attributes:
        rounds: Times that scales are fitted and signs chosen again.
        damping: Of the Gram matrix, relative to the mean of its diagonal.
    """

    rounds: int = Field(8, ge=0, le=1000)
    damping: float = Field(0.01, gt=0, le=1)


class QBB(Method[QBBOptions]):
    """Sums of binary matrices.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="qbb", scheme="w4a16", options={"rounds": 4})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.028  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    @property
    def torch_only(self) -> str:
        """The bases."""
        return "its binary matrices with a scale each"

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer with a scale per output and matrix."""
        bits = scheme.weight.bits
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        scales = torch.empty(out_features, bits, dtype=SCALE_DTYPE, device="meta")
        weight = QuantizedWeight(codes, scales, None, bits, PER_CHANNEL)
        return QuantizedLinear(weight, scheme.activation_bits, parts=TorchParts(codebook="binary"))

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Take bases off one by one, then improve them together."""
        gram = torch.from_numpy(problem.gram()).double()
        energies = gram.diagonal()
        gram = gram + torch.diag(self.options.damping * energies.mean() + (energies == 0).double())
        signs, scales = greedy_bases(problem.weight.double(), problem.scheme.weight.bits)
        for _ in range(self.options.rounds):
            scales = fitted(problem.weight.double(), signs, gram)
            signs = chosen(problem.weight.double(), scales, signs, gram)
        scales = fitted(problem.weight.double(), signs, gram) if self.options.rounds else scales
        weight = QuantizedWeight(packable(signs), scales.to(SCALE_DTYPE), None, len(signs), PER_CHANNEL)
        return QuantizedLinear(weight, problem.scheme.activation_bits, parts=TorchParts(codebook="binary"))


def greedy_bases(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Signs `[count, out, in]` and scales `[out, count]`: of the weight, then of the remainder, and so on.

    Example:
        >>> signs, scales = greedy_bases(torch.tensor([[3.0, -1.0]]), count=2)
        >>> signs.squeeze(1), scales
        (tensor([[ 1., -1.],
                [ 1.,  1.]], dtype=torch.float64), tensor([[2., 1.]], dtype=torch.float64))
    """
    left, signs, scales = weight.clone(), [], []
    for _ in range(count):
        signs.append(torch.where(left >= 0, 1.0, -1.0).double())
        scales.append(left.abs().mean(1))
        left = left - scales[-1].unsqueeze(1) * signs[-1]
    return torch.stack(signs), torch.stack(scales, 1)


def fitted(weight: Tensor, signs: Tensor, gram: Tensor) -> Tensor:
    """The best scales `[out, count]` for given signs, under the Gram matrix `[in, in]`.

    Example:
        >>> signs = torch.tensor([[[1.0, -1.0, 1.0]], [[1.0, 1.0, -1.0]]])
        >>> fitted(torch.tensor([[3.0, -1.0, 1.0]]), signs, torch.eye(3)).round(decimals=2)
        tensor([[2., 1.]])
    """
    weighed = signs @ gram
    normal = torch.einsum("koi,loi->okl", weighed, signs)
    wanted = torch.einsum("koi,oi->ok", weighed, weight)
    ridge = 1e-9 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(len(signs))
    scales: Tensor = torch.linalg.solve(normal + ridge, wanted.unsqueeze(2)).squeeze(2)
    return scales


def chosen(weight: Tensor, scales: Tensor, signs: Tensor, gram: Tensor) -> Tensor:
    """Signs chosen again column by column, all of a weight's together, given the other columns.

    Example:
        >>> weight, scales = torch.tensor([[3.0, -1.0]]).double(), torch.tensor([[2.0, 1.0]]).double()
        >>> chosen(weight, scales, torch.ones(2, 1, 2).double(), torch.eye(2).double()).squeeze(1)  # 2 + 1 and -2 + 1
        tensor([[ 1., -1.],
                [ 1.,  1.]], dtype=torch.float64)
    """
    count = len(signs)
    patterns = torch.stack([((torch.arange(2**count) >> k) & 1) * 2.0 - 1.0 for k in range(count)]).double()
    values = scales @ patterns  # `[out, 2^count]`, the values that a weight can have
    decoded = torch.einsum("ok,koi->oi", scales, signs)
    pull = (weight - decoded) @ gram
    signs = signs.clone()
    for column in range(weight.shape[1]):
        wanted = decoded[:, column] + pull[:, column] / gram[column, column]
        best = (values - wanted.unsqueeze(1)).abs().argmin(1)
        change = values.gather(1, best.unsqueeze(1)).squeeze(1) - decoded[:, column]
        signs[:, :, column] = patterns[:, best]
        decoded[:, column] += change
        pull -= torch.outer(change, gram[column])
    return signs


def packable(signs: Tensor) -> Tensor:
    """Signs `[count, out, in]` as codes int8 `[out, in]` of `count` bits, signed as they are packed.

    Example:
        >>> packable(torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]]]))
        tensor([[-1,  0]], dtype=torch.int8)
    """
    count = len(signs)
    codes = ((signs > 0).long() << torch.arange(count)[:, None, None]).sum(0)
    return torch.where(codes >= 2 ** (count - 1), codes - 2**count, codes).to(torch.int8)
