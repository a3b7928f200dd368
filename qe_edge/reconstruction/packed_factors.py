"""INT4 low-rank factors: twice the rank of INT8 factors in the same bytes, and close to nothing lost.

Rounding to nearest loses too much: a row of `down` has one scale, and the input's largest channels multiply its error.
So GPTQ rounds `down` under the input's Gram matrix. The up factor is fitted to the rounded `down`, and GPTQ rounds it
under the Gram matrix of `down x`. Each step is fitted to the error that the steps before it leave: first the shared
expert, then the routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import block_diag
from torch import Tensor

from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid, pack_int4
from qe_edge.numerics.matrices import Matrix, beside, cast, double, joined, parts_of, pseudo_solve, to_tensor
from qe_edge.reconstruction.designs import ErrorSpectrum
from qe_edge.reconstruction.factors import StoredFactor
from qe_edge.reconstruction.gptq import Hessian, gptq_round
from qe_edge.reconstruction.shares import GLOBAL_SHARE

GRID = WeightGrid(4, PER_CHANNEL, symmetric=True)
DOWN_DAMPING, UP_DAMPING = 0.01, 1e-4
ROUNDING = 1e-5  # of the largest energy, what a Gram matrix that was added up in float32 does not know
ROWS = 1024  # of a large matrix that are in float64 at a time


@dataclass(frozen=True)
class PackedCorrection:
    """Factors of all experts in INT4.

    Attributes:
        down: Packed `[rank, ceil(in / 2)]` with a scale per row.
        up: Packed `[out, ceil(rank / 2)]` with a scale per row.
        downs: For every expert the real values `[rank_i, in]` of its part.
        ups: For every expert the real values `[out, rank_i]` of its part.
    """

    down: StoredFactor
    up: StoredFactor
    downs: list[Matrix]
    ups: list[Matrix]


def pack_correction(
    directions: Sequence[Matrix], error: Matrix, hessian: Hessian, tokens: Sequence[Matrix | None]
) -> PackedCorrection:
    """Round corrections to INT4.

    Args:
        directions: For the shared expert (first; rank 0 for none) and every routed one `[out, rank_i]`, orthonormal.
        error: `[out, in]` float64 that all experts together correct.
        hessian: Gram matrix `[in, in]` of all tokens.
        tokens: For every expert the tokens `[n, in]` that it corrects; None for all.

    Example:
        >>> random = np.random.default_rng(0)
        >>> tokens, error = random.standard_normal((500, 32)), random.standard_normal((16, 32))
        >>> directions = np.linalg.qr(random.standard_normal((16, 4)))[0]
        >>> packed = pack_correction([directions], error, Hessian(tokens.T @ tokens / 500), [None])
        >>> tuple(packed.down.codes.shape), tuple(packed.up.codes.shape)  # two codes a byte
        ((4, 16), (16, 2))
    """
    left = error
    codes, scales, downs, fitted, weighing = [], [], [], [], []
    for vectors, own in zip(directions, tokens, strict=True):
        wanted = double(cast(vectors.T, left) @ left) if isinstance(left, Tensor) else vectors.T @ left
        if not vectors.shape[1]:
            downs.append(wanted)
            fitted.append(vectors)
            continue
        inputs = hessian
        if own is not None and len(own):
            moments = cast(own.T @ own, hessian.gram) if isinstance(own, Tensor) else double(own.T @ own)
            moments = moments / len(own)
            inputs = Hessian((1.0 - GLOBAL_SHARE) * moments + GLOBAL_SHARE * hessian.gram)
        rounded = gptq_round(to_tensor(wanted).float(), inputs, GRID, DOWN_DAMPING, clip=True)
        down = beside(rounded.decode().double(), error)
        spread = _spread(inputs.gram, down)
        hidden, target = down @ spread, _times(left, spread)
        up = pseudo_solve(hidden, target.T, 1e-10).T
        if own is None:
            left = left - (cast(up @ down, left) if isinstance(left, Tensor) else up @ down)
        codes.append(rounded.codes)
        scales.append(rounded.scales[:, 0])
        downs.append(down)
        fitted.append(up)
        weighing.append(hidden)
    if isinstance(error, Tensor):
        energies: Matrix = torch.block_diag(*weighing)  # type: ignore[no-untyped-call] # torch has no types here
    else:
        energies = block_diag(*weighing)
    diagonal = energies.diagonal()
    damping = max(UP_DAMPING, ROUNDING * float(diagonal.max()) / max(float(diagonal.mean()), 1e-300))
    up = gptq_round(to_tensor(joined(fitted, 1)).float(), energies, GRID, damping, clip=True)
    return PackedCorrection(
        StoredFactor(pack_int4(torch.cat(codes)), torch.cat(scales)),
        StoredFactor(pack_int4(up.codes), up.scales[:, 0].clone()),
        downs,
        parts_of(beside(up.decode().double(), error), [part.shape[1] for part in fitted], 1),
    )


def _spread(gram: Matrix, down: Matrix) -> Matrix:
    """`gram @ down^T` `[in, rank]` float64, from some rows of the Gram matrix at a time, which become float64."""
    return joined([double(gram[start : start + ROWS]) @ down.T for start in range(0, len(gram), ROWS)], 0)


def _times(error: Matrix, spread: Matrix) -> Matrix:
    """`error @ spread` `[out, rank]` float64, as precise as the error is."""
    if isinstance(error, Tensor):
        return (error @ cast(spread, error)).double()
    return np.concatenate([double(error[start : start + ROWS]) @ spread for start in range(0, len(error), ROWS)])


def packing_loss(error: Matrix, hessian: Hessian, spectrum: ErrorSpectrum) -> float:
    """Share that INT4 factors lose of the energy that a correction of the spectrum's largest rank captures.

    Example:
        >>> random = np.random.default_rng(0)
        >>> tokens, error = random.standard_normal((500, 32)), random.standard_normal((16, 32))
        >>> gram = tokens.T @ tokens / 500
        >>> 0 < packing_loss(error, Hessian(gram), ErrorSpectrum.of(error, gram, rank=4)) < 0.02
        True
    """
    captured = float(spectrum.captured[-1])
    if captured <= 0:
        return 0.0
    packed = pack_correction([spectrum.space.lift(spectrum.vectors)], error, hessian, [None])
    up, down = packed.ups[0], packed.downs[0]
    spread = _spread(hessian.gram, down)
    taken = 2 * _times(error, spread) - up @ (down @ spread)  # tr(E G E^T) - tr(U taken^T) is the energy of E - U D
    kept = (up * taken).sum() if isinstance(up, Tensor) else np.einsum("ij,ij->", up, taken)
    return max(captured - float(kept), 0.0) / captured
