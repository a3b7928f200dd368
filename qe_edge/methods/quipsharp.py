"""QuIP# (ICML 2024): random Hadamard bases on both sides, and eight weights at a time rounded to an E8 lattice point.

`W' = U W V^T` with randomized Hadamard matrices. Blocks of eight columns are rounded one after the other to points of
the codebook E8P, 16 bits for eight weights, and later blocks make up for the error of each (BlockLDLQ). With four bits
a block has two points, the second of which rounds the error of the first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import TorchParts, basis_parts
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.numerics.codebooks import BLOCK, FINE, e8p_codes, e8p_points, nearest_e8p
from qe_edge.numerics.grids import PER_CHANNEL, SCALE_DTYPE, QuantizedWeight, WeightGrid
from qe_edge.numerics.orthogonal import hadamard_like, random_rotation
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.second_order import inverse_factor
from qe_edge.system.errors import RecipeError

SPREAD = {2: 1.03, 4: 0.93}  # standard deviation of a normal weight in lattice units where its error is least


class QuIPSharpOptions(MethodOptions):
    """Options of QuIP#.

    Attributes:
        damping: Damping of the Hessian, relative to the mean of its diagonal.
    """

    damping: float = Field(0.01, gt=0, le=1)


class QuIPSharp(Method[QuIPSharpOptions]):
    """Hadamard incoherence and lattice codebooks.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="quipsharp", scheme="w4a16")
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.06  # method rtn: 0.10
        True
    """

    @property
    def needs(self) -> StatisticsRequest | None:
        """The Gram matrix."""
        return StatisticsRequest(gram=True, tokens=0)

    @property
    def torch_only(self) -> str:
        """Bases and codebook."""
        return "its lattice codebook and its changes of basis at every layer's input and output"

    def check_scheme(self, scheme: Scheme) -> None:
        """Lattice points have 2 or 4 bits a weight.

        Raises:
            RecipeError: For 3 bits.
        """
        if scheme.weight.bits == 3:
            raise RecipeError(
                f"QuIP# has no codebook of 3 bits, which the scheme '{scheme.name}' asks for.",
                "Choose a scheme of 2 or 4 bits, for example w2a16, or method quip.",
            )

    def check_shape(self, name: str, out_features: int, in_features: int) -> None:
        """Lattice points hold eight inputs.

        Raises:
            RecipeError: For another number of inputs.
        """
        if in_features % BLOCK:
            raise RecipeError(
                f"'{name}' [{out_features}, {in_features}] has no multiple of {BLOCK} inputs, which QuIP# needs.",
                "Choose method quip, or leave the module out (--modules).",
            )

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer with a scale per output, two bases and signs."""
        plain = super().empty(out_features, in_features, scheme.with_grid(WeightGrid(scheme.weight.bits)))
        parts: dict[str, Any] = {}
        for side, size in (("in", in_features), ("out", out_features)):
            parts |= basis_parts(side, hadamard_like(size), signed=True)
        empty: dict[str, Any] = {name: part.to("meta") for name, part in parts.items()}
        return replace(plain, parts=TorchParts(codebook="e8p", **empty))

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Rotate, then round block by block."""
        self.check_scheme(problem.scheme)
        random = np.random.default_rng(problem.seed)
        out_features, in_features = problem.weight.shape
        basis_in, basis_out = (random_rotation(size, random).halved() for size in (in_features, out_features))
        gram = basis_in(basis_in(torch.from_numpy(problem.gram()).double()).T)
        rotated = basis_in.inverse_transposed()(problem.weight.double())
        rotated = basis_out.inverse_transposed()(rotated.T.contiguous()).T.contiguous()
        weight = block_ldlq(rotated, inverse_factor(gram.numpy(), self.options.damping), problem.scheme.weight.bits)
        parts = basis_parts("in", basis_in, signed=True) | basis_parts("out", basis_out, signed=True)
        return QuantizedLinear(weight, problem.scheme.activation_bits, parts=TorchParts(codebook="e8p", **parts))


def block_ldlq(weight: Tensor, factor: Tensor, bits: int) -> QuantizedWeight:
    """Codes of E8P, block by block: later blocks make up for the error of each.

    Args:
        weight: `[out, in]` float64.
        factor: `[in, in]` upper Cholesky factor of the Hessian's inverse.
        bits: 2 or 4.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> weight, factor = torch.randn(4, 16).double(), torch.eye(16).double()
        >>> codes = block_ldlq(weight, factor, bits=2)
        >>> tuple(codes.codes.shape), codes.bits, int(codes.codes.min()), int(codes.codes.max())
        ((4, 16), 2, -2, 1)
    """
    scales = (weight.square().mean(1, keepdim=True).sqrt() / SPREAD[bits]).to(SCALE_DTYPE)
    w, scale, codes = weight.clone(), scales.double(), []
    divisor = torch.where(scale > 0, scale, 1.0)  # the lattice has no zero: rows of zeros have a scale of zero
    for start in range(0, w.shape[1], BLOCK):
        span, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        found, points = rounded_block((w[:, span] / divisor).float(), bits)
        codes.append(found)
        error = w[:, span] - points.double() * scale
        shares = torch.linalg.solve_triangular(factor[span, span], error, upper=True, left=False)
        w[:, later] -= shares @ factor[span, later]
    signed = torch.cat(codes, 1)
    signed = torch.where(signed >= 2 ** (bits - 1), signed - 2**bits, signed)  # as they are packed
    return QuantizedWeight(signed.to(torch.int8), scales, None, bits, PER_CHANNEL)


def rounded_block(vectors: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int64 `[out, 8]` and lattice points `[out, 8]` of vectors `[out, 8]`.

    Example:
        >>> codes, points = rounded_block(torch.full((1, 8), 0.6), bits=2)
        >>> points
        tensor([[0.7500, 0.7500, 0.7500, 0.7500, 0.7500, 0.7500, 0.7500, 0.7500]])
    """
    index = nearest_e8p(vectors)
    codes, points = e8p_codes(index.unsqueeze(1)), e8p_points(index)
    if bits == 4:
        fine = nearest_e8p((vectors - points) / FINE)
        codes, points = codes | (e8p_codes(fine.unsqueeze(1)) << 2), points + FINE * e8p_points(fine)
    return codes, points
