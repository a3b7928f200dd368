"""Rules that choose the main branch's codes: nearest, in a searched range, with AWQ's channel scales, or by GPTQ.

All rules stay on the scheme's number grid, so a low-rank correction can follow each of them in the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from qe_edge.numerics.channel_scales import power_scale, storable_inverse
from qe_edge.numerics.grids import QuantizedWeight, WeightGrid, quantize_weight
from qe_edge.numerics.matrices import Matrix, to_tensor
from qe_edge.reconstruction.gptq import Hessian, gptq_round
from qe_edge.reconstruction.polishing import polished
from qe_edge.reconstruction.range_search import clipped_round
from qe_edge.system.errors import NumericalError

AWQ_STEPS = 20


@dataclass(frozen=True)
class Rounding:
    """Choice of the codes.

    Attributes:
        kind: "nearest", "awq" (searched channel scales, then nearest) or "gptq".
        clip: Search the range of every scale for "nearest" and "gptq".
        damping: Of GPTQ's Hessian, relative to the mean of its diagonal.
        polish: Rounds in which GPTQ's codes and scales are chosen again, each given all others.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[0.7, 0.26, -0.1]])
        >>> codes, inverse = Rounding("gptq")(weight, WeightGrid(4), np.eye(3), abs_mean=np.ones(3))
        >>> codes.codes.tolist(), inverse
        ([[7, 3, -1]], None)
        >>> Rounding("gptq")(weight, WeightGrid(4), None, abs_mean=np.ones(3))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: Rounding 'gptq' needs the Gram matrix. Pass calibration tokens.
    """

    kind: Literal["nearest", "awq", "gptq"] = "nearest"
    clip: bool = False
    damping: float = 0.01
    polish: int = 0

    def __call__(
        self, weight: Tensor, grid: WeightGrid, gram: Matrix | Hessian | None, abs_mean: np.ndarray
    ) -> tuple[QuantizedWeight, Tensor | None]:
        """Codes of `weight` `[out, in]`, and float16 `1 / s` `[in]` where the input must be divided by `s`.

        Args:
            weight: Float32.
            grid: Grid of the codes.
            gram: `[in, in]`; only plain nearest rounding does without it.
            abs_mean: `[in]` mean |x|.

        Raises:
            NumericalError: If the Gram matrix is missing.
        """
        if self.kind == "nearest" and not self.clip:
            return quantize_weight(weight, grid), None
        if gram is None:
            raise NumericalError(f"Rounding '{self.kind}' needs the Gram matrix.", "Pass calibration tokens.")
        if self.kind == "gptq":
            codes = gptq_round(weight, gram, grid, self.damping, clip=self.clip)
            if self.polish:
                matrix = gram.matrix() if isinstance(gram, Hessian) else gram
                codes = polished(codes, weight, matrix, grid, self.damping, self.polish)
            return codes, None
        matrix = to_tensor(gram.matrix() if isinstance(gram, Hessian) else gram)
        if self.kind == "awq":
            return search_scale(weight, abs_mean, matrix.float(), grid, AWQ_STEPS)
        return clipped_round(weight, grid, matrix.diagonal().float()), None


def search_scale(
    weight: Tensor, abs_mean: np.ndarray, gram: Tensor, grid: WeightGrid, steps: int
) -> tuple[QuantizedWeight, Tensor]:
    """AWQ (MLSys 2024): the channel scale, a power of `abs_mean`, that loses least.

    Args:
        weight: `[out, in]` float32.
        abs_mean: `[in]` mean |x|.
        gram: `[in, in]` float32.
        grid: Grid of the codes.
        steps: Number of powers to try.

    Returns:
        The codes of the scaled weight, and `1 / s` float16 `[in]`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(16, 32), torch.randn(200, 32)
        >>> tokens[:, 5] *= 30  # an outlier channel
        >>> gram, abs_mean = tokens.T @ tokens / 200, tokens.abs().mean(0).double().numpy()
        >>> codes, inverse = search_scale(weight, abs_mean, gram, WeightGrid(4), steps=20)
        >>> int(inverse.argmin())
        5
    """
    best = None
    for step in range(steps):
        inverse = storable_inverse(power_scale(abs_mean, step / steps)).to(weight.device)
        codes = quantize_weight(weight / inverse.float(), grid)
        error = weight - codes.decode() * inverse.float()
        loss = float(((error @ gram) * error).sum())
        if best is None or loss < best[0]:
            best = loss, codes, inverse
    if best is None:
        raise ValueError("steps must be positive")
    return best[1], best[2]
