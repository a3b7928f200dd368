"""SVDQuant (ICLR 2025): a low-rank branch takes the top of the smoothed weight, and the residual is quantized.

`W diag(s) = L + R`, `y = Q(R) Q_a(x / s) + L x / s`. The other low-rank methods here fit the error of an already
quantized weight. This one makes the weight easier to quantize first, and then alternates between the two. Our low-rank
branch reads the unscaled input, so `1 / s` is folded into its down factor. The codes are chosen for the factors as they
are stored, so that the residual makes up for their rounding too.

Same as the original: candidates of the smoothing (powers of the largest magnitudes of inputs and weights), output error
as the objective, alternation with the best iterate kept, the end at the first iterate that is no better, GPTQ on the
residual as an option. Different: the scheme's grids instead of groups of 64. The output error is the error of the
linear, on a sample of the tokens. The search judges every candidate with a sketched low-rank branch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import Adapters, QuantizedLinear
from qe_edge.methods.smoothquant import smoothing_scale
from qe_edge.methods.static import StaticCorrection, StaticOptions
from qe_edge.numerics.channel_scales import storable_inverse
from qe_edge.numerics.grids import QuantizedWeight, fake_quantize_activation, quantize_weight
from qe_edge.reconstruction.branches import static_correction
from qe_edge.reconstruction.directions import diagonal_directions
from qe_edge.reconstruction.factors import StoredFactor
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.problem import LinearProblem

DAMPING = 0.01  # of GPTQ on the residual
SKETCH_EXTRA, SKETCH_POWERS = 8, 2


class SVDQuantOptions(StaticOptions):
    """Options of SVDQuant.

    Attributes:
        grid: Number of smoothing powers tried besides no smoothing; 0 for no smoothing.
        iterations: Most alternations between low-rank branch and codes.
        rounding: Rule that rounds the residual of the best iterate; "gptq" is kept only if it is better.
        tokens: Size of the token sample that errors are measured on.
    """

    grid: int = Field(20, ge=0, le=100)
    iterations: int = Field(100, ge=1, le=1000)
    rounding: Literal["nearest", "gptq"] = "nearest"
    tokens: int = Field(1024, ge=1, le=1 << 20)


class SVDQuant(StaticCorrection[SVDQuantOptions]):
    """Low-rank decomposition of the weight itself; the preset "paper" has the original's rank 32 in 16 bits.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> recipe = qe_edge.make_recipe(method="svdquant", scheme="w4a16", options={"rank": 16, "rounding": "gptq"})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.037  # method rtn: 0.10
        True
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "paper": {"rank": 32, "shrink": False, "adapter_dtype": "float16"},
    }

    @property
    def needs(self) -> StatisticsRequest | None:
        """Channel maxima and a token sample; GPTQ needs the Gram matrix."""
        return StatisticsRequest(gram=self.options.rounding == "gptq", tokens=self.options.tokens)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Smooth, decompose, round the residual, and alternate as long as the output gets better."""
        judge = _Judge.of(problem)
        rank = self.rank(*problem.weight.shape)
        inverse = self._smoothing(problem, judge, rank)
        weighing = 1 / inverse.double().numpy()
        target = problem.weight.double().numpy()
        best: _Iterate | None = None
        for _ in range(self.options.iterations):
            directions = diagonal_directions(target, weighing, rank)
            iterate = judge.iterate(static_correction(target, directions, self.options.adapter_dtype), inverse)
            if best is not None and iterate.loss >= best.loss:
                break
            best = iterate
            target = (problem.weight.double() - iterate.codes.decode().double() * inverse.double()).numpy()
        if best is None:
            raise ValueError("iterations must be positive")
        if self.options.rounding == "gptq":
            best = min(best, self._gptq(problem, judge, best), key=lambda one: one.loss)
        inv_omega = None if bool((best.inverse == 1).all()) else best.inverse
        return QuantizedLinear(best.codes, problem.scheme.activation_bits, inv_omega, best.adapters)

    def _smoothing(self, problem: LinearProblem, judge: _Judge, rank: int) -> Tensor:
        """`1 / s` `[in]` float16 of the power that loses least; all ones where none helps."""
        measured, weight = problem.measured(), problem.weight
        largest = weight.abs().amax(0).double().numpy()
        best = torch.ones(weight.shape[1], dtype=torch.float16)
        if not self.options.grid:
            return best
        sketch = np.random.default_rng(problem.seed).standard_normal((weight.shape[1], rank + SKETCH_EXTRA))
        least = judge.loss(_sketched(weight, best, sketch, rank), best)[1]
        for step in range(1, self.options.grid + 1):
            scale = smoothing_scale(measured.abs_max, largest, step / self.options.grid)
            inverse = storable_inverse(scale / np.sqrt(scale.max() * scale.min()))
            loss = judge.loss(_sketched(weight, inverse, sketch, rank), inverse)[1]
            if loss < least:
                least, best = loss, inverse
        return best

    def _gptq(self, problem: LinearProblem, judge: _Judge, best: _Iterate) -> _Iterate:
        """The residual of `best` rounded by GPTQ."""
        factor = best.inverse.double()
        gram = torch.from_numpy(problem.gram()) * factor * factor.unsqueeze(1)
        residual = (problem.weight - correction(best.adapters, problem.weight)) / best.inverse.float()
        codes = gptq_round(residual, gram.numpy(), problem.scheme.weight, DAMPING)
        return replace(
            best, codes=codes, loss=judge.judge(codes, correction(best.adapters, problem.weight), best.inverse)
        )


@dataclass(frozen=True)
class _Iterate:
    """Codes and factors that belong together, and the square error of their output."""

    codes: QuantizedWeight
    adapters: Adapters | None
    inverse: Tensor
    loss: float


@dataclass(frozen=True)
class _Judge:
    """Output errors of one problem on its token sample."""

    problem: LinearProblem
    tokens: Tensor

    @classmethod
    def of(cls, problem: LinearProblem) -> _Judge:
        """For the sampled tokens of `problem`."""
        return cls(problem, torch.from_numpy(problem.measured().tokens))

    def judge(self, codes: QuantizedWeight, low_rank: Tensor, inverse: Tensor) -> float:
        """Square error of the output with this main branch and a low-rank part `[out, in]` for the unscaled input."""
        factor = inverse.float()
        bits = self.problem.scheme.activation_bits
        if not bits:
            wrong = codes.decode() * factor + low_rank - self.problem.weight
            return float((self.tokens @ wrong.T).square().sum(dtype=torch.float64))
        main = fake_quantize_activation(self.tokens * factor, bits) @ codes.decode().T
        wanted = self.tokens @ (self.problem.weight - low_rank).T
        return float((main - wanted).square().sum(dtype=torch.float64))

    def loss(self, low_rank: Tensor, inverse: Tensor) -> tuple[QuantizedWeight, float]:
        """Codes of the residual of `low_rank`, and the square error with them."""
        residual = (self.problem.weight - low_rank) / inverse.float()
        codes = quantize_weight(residual, self.problem.scheme.weight)
        return codes, self.judge(codes, low_rank, inverse)

    def iterate(self, adapters: Adapters | None, inverse: Tensor) -> _Iterate:
        """Codes for given factors."""
        codes, loss = self.loss(correction(adapters, self.problem.weight), inverse)
        return _Iterate(codes, adapters, inverse, loss)


def correction(adapters: Adapters | None, like: Tensor) -> Tensor:
    """The correction `[out, in]` float32 of one static expert's stored factors; zeros without factors.

    Example:
        >>> adapters = static_correction(np.diag([2.0, 1.0]), np.array([[1.0], [0.0]]), "float32")
        >>> correction(adapters, like=torch.zeros(2, 2)), correction(None, like=torch.zeros(1, 2))
        (tensor([[2., 0.],
                [0., 0.]]), tensor([[0., 0.]]))
    """
    if adapters is None:
        return torch.zeros_like(like)
    up = StoredFactor(adapters.up, adapters.up_scale).real()
    down = StoredFactor(adapters.down, adapters.down_scale).real()
    return torch.from_numpy(up @ down).float()


def _sketched(weight: Tensor, inverse: Tensor, sketch: np.ndarray, rank: int) -> Tensor:
    """About the best rank-`rank` part of `W / inverse`, for the unscaled input: subspace iteration, then projection."""
    if not rank:
        return torch.zeros_like(weight)
    smoothed = weight / inverse.float()
    basis = torch.linalg.qr(smoothed @ torch.from_numpy(sketch).float())[0]
    for _ in range(SKETCH_POWERS):
        basis = torch.linalg.qr(smoothed @ (smoothed.T @ basis))[0]
    reduced = basis.T @ smoothed
    values, vectors = torch.linalg.eigh((reduced @ reduced.T).double())
    top = basis @ vectors[:, torch.argsort(values, descending=True)[:rank]].float()
    low_rank: Tensor = (top @ (top.T @ smoothed)) * inverse.float()
    return low_rank
