"""QuIP (NeurIPS 2023): inputs and outputs of a layer are rotated at random, so that no weight stands out, then LDLQ.

With random orthogonal `V` and `U`, each the product (Kronecker) of two small ones, and a scale `d` per input channel,
`W' = U W diag(d) V^T` is rounded under the Hessian `V diag(d)^-1 H diag(d)^-1 V^T`. The layer computes
`y = U^T Q(W') V (x / d)`. LDLQ gives the codes of GPTQ (theorem 6 of the paper), so `gptq_round` is used.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import TorchParts, basis_parts
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.channel_scales import storable_inverse
from qe_edge.numerics.orthogonal import kronecker_sizes, random_orthogonal
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.problem import LinearProblem

SMALLEST = 1e-12


class QuIPOptions(MethodOptions):
    """Options of QuIP.

    Attributes:
        rotate: Sides of every layer that are rotated.
        rescale: Scale the input channels first, by the fourth root of the ratio of input and weight energies.
        clip: Search the range of every scale.
        damping: Damping of the Hessian, relative to the mean of its diagonal.
    """

    rotate: Literal["both", "inputs"] = "both"
    rescale: bool = True
    clip: bool = True
    damping: float = Field(0.01, gt=0, le=1)


class QuIP(Method[QuIPOptions]):
    """Incoherence processing of every layer by itself, and adaptive rounding.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="quip", scheme="w4a16", options={"rotate": "inputs"})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.054  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    @property
    def torch_only(self) -> str:
        """The bases."""
        return "its changes of basis at every layer's input and output"

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer with two bases."""
        plain = super().empty(out_features, in_features, scheme)
        sides = {"in": in_features, "out": out_features} if self.options.rotate == "both" else {"in": in_features}
        parts: dict[str, Any] = {
            f"{side}_{name}": torch.empty(part, part, dtype=torch.float16, device="meta")
            for side, size in sides.items()
            for name, part in zip(("left", "right"), kronecker_sizes(size), strict=True)
        }
        scale = torch.empty(in_features, dtype=torch.float16, device="meta") if self.options.rescale else None
        return QuantizedLinear(plain.weight, plain.activation_bits, scale, None, TorchParts(**parts))

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Scale, rotate, round."""
        random = np.random.default_rng(problem.seed)
        out_features, in_features = problem.weight.shape
        gram = torch.from_numpy(problem.gram()).double()
        weight, inverse = problem.weight, None
        if self.options.rescale:
            inverse = storable_inverse(incoherent_scale(gram.diagonal(), weight))
            weight = weight / inverse.float()
            gram = gram * torch.outer(inverse.double(), inverse.double())
        basis_in = random_orthogonal(in_features, random).halved()
        parts = basis_parts("in", basis_in, signed=False)
        rotated = basis_in.inverse_transposed()(weight.double())  # exact, whatever float16 did to the factors
        if self.options.rotate == "both":
            basis_out = random_orthogonal(out_features, random).halved()
            parts |= basis_parts("out", basis_out, signed=False)
            rotated = basis_out.inverse_transposed()(rotated.T).T
        hessian = basis_in(basis_in(gram).T)
        grid, clip = problem.scheme.weight, self.options.clip
        codes = gptq_round(rotated.float().contiguous(), hessian.numpy(), grid, self.options.damping, clip=clip)
        return QuantizedLinear(codes, problem.scheme.activation_bits, inverse, None, TorchParts(**parts))


def incoherent_scale(energies: Tensor, weight: Tensor) -> np.ndarray:
    """The divisor of every input channel `[in]` float64: `(H_cc / sum_o W_oc^2)^(1/4)`, geometric mean 1.

    Example:
        >>> incoherent_scale(torch.tensor([16.0, 1.0]), torch.ones(4, 2)).round(3)
        array([1.414, 0.707])
    """
    columns = weight.double().square().sum(0)
    logarithm = (energies.double().clamp_min(SMALLEST).log() - columns.clamp_min(SMALLEST).log()) / 4
    scale: np.ndarray = (logarithm - logarithm.mean()).exp().numpy()
    return scale
