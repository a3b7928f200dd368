"""MASQuant (CVPR 2026): text and image tokens have channel scales of their own, and one quantized weight.

`y = Q(W S_t) Q_a(x / S_t)` for text, and `y = Q(W S_t) Q_a(x / S_v) + L_A L_B x` for image tokens (modality-aware
smoothing). The low-rank pair is what `W S_v` has beyond the codes for text, in the whitened norm of the image tokens
(cross-modal compensation). The scales begin as SmoothQuant's of each modality alone and are learned by gradients on the
mean absolute error, each with codes of its own.

The original is told which tokens are images. A layer here sees numbers alone: it recognises image tokens by the sign of
a linear function of |x|, which is fitted to the calibration tokens. A token that is taken for the other modality is
computed with a scale, and as an image token with a low-rank pair, that fit it less.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from qe_edge.calibration.sensitivity import IMAGE
from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import TorchParts
from qe_edge.methods.base import Method, MethodOptions
from qe_edge.methods.smoothquant import smoothing_scale
from qe_edge.numerics.grids import QuantizedWeight, quantize_weight
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.directions import whitened_directions
from qe_edge.reconstruction.learned_scales import ScaleLearning, learn_inverse
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.ranks import scale_rank
from qe_edge.reconstruction.router import ridge_router


class MASQuantOptions(MethodOptions):
    """Options of MASQuant.

    Attributes:
        alpha: Of SmoothQuant's formula, from which the scales begin.
        steps: Steps by which a modality's scale is learned; 0 keeps the formula's.
        rate: Their rate.
        rank: Of the low-rank pair for image tokens; 0 leaves it out.
        shrink: Scale the rank down on small layers by the same rule as Quant Experts.
        tokens: Size of the token sample that everything is learned on.
    """

    alpha: float = Field(0.5, ge=0, le=1)
    steps: int = Field(64, ge=0, le=10_000)
    rate: float = Field(0.01, gt=0, le=1)
    rank: int = Field(64, ge=0, le=2048)
    shrink: bool = True
    tokens: int = Field(2048, ge=1, le=1 << 20)


class MASQuant(Method[MASQuantOptions]):
    """Modality-aware smoothing and cross-modal compensation.

    Example:
        >>> import qe_edge
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers; these tokens are of one modality
        >>> layer = qe_edge.quantize_linear(weight, tokens, qe_edge.make_recipe(method="masquant", scheme="w4a6"))
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.07  # method smoothquant: 0.074, rtn: 0.12
        True
    """

    @property
    def stack_siblings(self) -> bool:
        """One pair of scales and one choice of modality for all consumers of an input."""
        return True

    @property
    def needs(self) -> StatisticsRequest | None:
        """A token sample."""
        return StatisticsRequest(gram=False, tokens=self.options.tokens)

    @property
    def torch_only(self) -> str:
        """What image tokens have for themselves."""
        return "its channel scales and low-rank factors for image tokens"

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A layer that sees both modalities."""
        plain = super().empty(out_features, in_features, scheme)
        channels = torch.empty(in_features, dtype=torch.float16, device="meta")
        rank = self._rank(out_features, in_features)
        parts = TorchParts(
            image_inverse=channels.clone(),
            image_router=channels.clone(),
            image_down=torch.empty(rank, in_features, dtype=torch.float16, device="meta") if rank else None,
            image_up=torch.empty(out_features, rank, dtype=torch.float16, device="meta") if rank else None,
        )
        return QuantizedLinear(plain.weight, plain.activation_bits, channels, None, parts)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Learn a scale for every modality, round with that of text, and make up for it on image tokens."""
        measured = problem.measured()
        tokens, image = torch.from_numpy(measured.tokens), torch.from_numpy(measured.token_kind == IMAGE)
        if bool(image.all()) or not bool(image.any()):
            inverse = self._learned(problem, tokens)
            return QuantizedLinear(_codes(problem, inverse), problem.scheme.activation_bits, inverse)
        inverse, other = self._learned(problem, tokens[~image]), self._learned(problem, tokens[image])
        codes = _codes(problem, inverse)
        parts = TorchParts(
            image_inverse=other,
            image_router=image_direction(tokens, image),
            **self._compensation(problem.weight - codes.decode() * other.float(), tokens[image]),
        )
        return QuantizedLinear(codes, problem.scheme.activation_bits, inverse, None, parts)

    def _learned(self, problem: LinearProblem, tokens: Tensor) -> Tensor:
        """The factor `[in]` float16 on the input that suits these tokens."""
        largest = problem.weight.abs().amax(0).double().numpy()
        start = smoothing_scale(tokens.abs().amax(0).double().numpy(), largest, self.options.alpha)
        learning = ScaleLearning(self.options.steps, self.options.rate, power=1, seed=problem.seed)
        return learn_inverse(problem.weight, tokens, problem.scheme, [start], learning)

    def _compensation(self, error: Tensor, tokens: Tensor) -> dict[str, Any]:
        """The low-rank pair for the error `[out, in]` on image tokens, as it is stored."""
        rank = self._rank(*error.shape)
        if not rank:
            return {}
        gram = (tokens.double().T @ tokens.double() / len(tokens)).numpy()
        wrong = error.double().numpy()
        up = torch.from_numpy(np.ascontiguousarray(whitened_directions(wrong, gram, rank))).half()
        down = torch.linalg.lstsq(up.double(), error.double()).solution  # for the factor as it is stored
        return {"image_down": down.half().contiguous(), "image_up": up}

    def _rank(self, out_features: int, in_features: int) -> int:
        side = min(out_features, in_features)
        return min(side, scale_rank(self.options.rank, side) if self.options.shrink else self.options.rank)


def image_direction(tokens: Tensor, image: Tensor) -> Tensor:
    """The linear function `[in]` float16 of |x| that is positive on image tokens, by ridge regression.

    Args:
        tokens: `[n, in]` float32.
        image: `[n]` bool.

    Example:
        >>> tokens, image = torch.tensor([[9.0, 1.0], [-8.0, 2.0], [1.0, 7.0]]), torch.tensor([True, True, False])
        >>> tokens.abs() @ image_direction(tokens, image).float() > 0
        tensor([ True,  True, False])
    """
    wrong = torch.stack((image, ~image), 1).double().numpy()  # what either choice costs
    scores = ridge_router(tokens.numpy(), wrong)
    direction = scores[0] - scores[1]
    return torch.from_numpy(direction / max(float(np.abs(direction).max()), 1e-30)).half()


def _codes(problem: LinearProblem, inverse: Tensor) -> QuantizedWeight:
    return quantize_weight(problem.weight / inverse.float(), problem.scheme.weight)
