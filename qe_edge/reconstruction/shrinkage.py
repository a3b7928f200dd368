"""Gram matrices of few tokens, with the correlations that they show taken for less than they seem.

`n` tokens have `in` channels, and `in^2` products are estimated from them. What is rounded for all of these products is
rounded for their noise too. So `c in` tokens are added whose channels have the same energy and no correlation: the
products of different channels shrink by `n / (n + c in)`, and the diagonal stays. It is the estimate of a covariance
under an inverse Wishart prior. `c` is what two halves of the tokens predict about each other best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qe_edge.numerics.matrices import Matrix, to_tensor

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)  # that are tried
DAMPING = 0.01  # relative to the mean of the diagonal, as where codes are rounded
WIDEST = 1024  # channels; of wider inputs as many are taken, evenly spread


def shrunk_gram(gram: Matrix, tokens: int, strength: float) -> Matrix:
    """The Gram matrix `[in, in]` with smaller products of different channels; the one that is given stays as it is.

    Args:
        gram: `[in, in]`, `X^T X` up to a factor.
        tokens: Number of tokens that it was measured on.
        strength: Added tokens, as a multiple of `in`.

    Example:
        >>> shrunk_gram(np.array([[4.0, 3.0], [3.0, 4.0]]), tokens=4, strength=1.0)
        array([[4., 2.],
               [2., 4.]])
    """
    shrunk = gram * (tokens / (tokens + strength * len(gram)))
    if isinstance(shrunk, Tensor):
        shrunk.diagonal().copy_(gram.diagonal())
    else:
        shrunk[range(len(gram)), range(len(gram))] = gram.diagonal()
    return shrunk


def chosen_strength(tokens: Matrix, strengths: Sequence[float] = STRENGTHS) -> float:
    """The strength under which rounding loses least on tokens that the Gram matrix has not seen.

    Second-order rounding spreads the error of a column over the later ones, `u_j / U_jj` with `U^T U = H^-1`. With
    errors of one size in every column it loses `sum_j u_j G u_j^T / U_jj^2` on tokens of Gram matrix `G`. `H` is of one
    half of the tokens and `G` of the other, and then the other way round.

    Args:
        tokens: `[n, in]`, in the order of the samples.
        strengths: Candidates.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> alike = torch.randn(4000, 1) + 0.1 * torch.randn(4000, 32)  # a correlation that is there
        >>> chosen_strength(alike), chosen_strength(torch.randn(48, 32))
        (0.25, 2.0)
    """
    sample = to_tensor(tokens)
    sample = sample[:, :: -(-sample.shape[1] // WIDEST)].double()
    half = len(sample) // 2
    if not half:
        return 0.0
    parts = sample[:half], sample[half:]
    grams = [part.T @ part / len(part) for part in parts]
    lost = [
        sum(_loss(shrunk_gram(grams[one], len(parts[one]), strength), grams[1 - one]) for one in (0, 1))
        for strength in strengths
    ]
    return strengths[int(np.argmin(lost))]


def _loss(hessian: Matrix, gram: Tensor) -> float:
    """What rounding under `hessian` loses on tokens of `gram`, both `[in, in]`."""
    damped = to_tensor(hessian).clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean().clamp_min(1e-30)
    diagonal += DAMPING * mean + (diagonal == 0) * mean
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    spread = upper / upper.diagonal().unsqueeze(1)
    return float(((spread @ gram) * spread).sum())
