"""Routed experts: groups of tokens, and a low-rank correction for each group (docs/method.md, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from qe_edge.calibration.statistics import InputStatistics
from qe_edge.numerics.matrices import Matrix, beside, cast, double, energies, to_numpy
from qe_edge.reconstruction.directions import (
    EXACT_SIDE,
    KRYLOV_EXTRA,
    KRYLOV_STEPS,
    WARM_STEPS,
    ErrorSpace,
    diagonal_directions,
    filled,
    krylov_directions,
    leading_directions,
    top_eigenvectors,
)
from qe_edge.reconstruction.shares import FEW_TOKENS, FEW_TOKENS_SHARE
from qe_edge.system.blas import one_lapack_thread
from qe_edge.system.parallel import map_threads

EM_GAIN = 1e-3  # relative gain below which the EM polish stops


@dataclass(frozen=True)
class ExpertProblem:
    """Everything the construction of routed experts reads.

    Attributes:
        error: `[side, in]` that the shared expert left, in any orthonormal coordinates of the outputs.
        statistics: Calibration statistics of the input.
        channels: Token-dependent channels C_r.
        labels: Cluster of every entry of `channels`.
        channel_weight: `[in]` mean |W| per input channel.
        experts: Number of experts.
        rank: Rank of each expert.
        rho: Share of the global covariance mixed into every expert's own.
        outputs: `[sample, side]` the error's output on every sampled token, if it is known already.
        covariance: `[side, side]` the error's output covariance over all tokens, if it is known already.
    """

    error: Matrix
    statistics: InputStatistics
    channels: np.ndarray
    labels: np.ndarray
    channel_weight: np.ndarray
    experts: int
    rank: int
    rho: float
    outputs: Matrix | None = None
    covariance: Matrix | None = None


def assign_by_mass(problem: ExpertProblem) -> np.ndarray:
    """Cluster `[sample]` with the largest importance mass for every sampled token; -1 where there is none (6.1).

    Example:
        >>> from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
        >>> tokens = torch.tensor([[5.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 7.0]])
        >>> measured = collect_statistics("mlp", torch.ones(3, 4), tokens, StatisticsRequest(important=2), seed=0)
        >>> labels = np.array([0, 0, 1, 1])  # channels 0 and 1 are a cluster, 2 and 3 another
        >>> sizes = {"experts": 2, "rank": 1, "rho": 0.0}
        >>> problem = ExpertProblem(np.zeros((3, 4)), measured, np.arange(4), labels, np.ones(4), **sizes)
        >>> assign_by_mass(problem)
        array([0, 1])
    """
    statistics = problem.statistics
    tokens = statistics.tokens
    mass = np.zeros((len(tokens), problem.experts))
    if statistics.importance is not None:
        cluster = np.full(tokens.shape[1] + 1, -1)
        cluster[problem.channels] = problem.labels
        lists = statistics.importance
        owner = cluster[lists]
        values = np.abs(_entries(tokens, np.maximum(lists, 0))) * problem.channel_weight[lists]
        rows, slots = np.nonzero(owner >= 0)
        np.add.at(mass, (rows, owner[rows, slots]), values[rows, slots])
    assigned: np.ndarray = mass.argmax(1)
    assigned[mass.max(1) <= 0] = -1
    return assigned


def _entries(tokens: Matrix, channels: np.ndarray) -> np.ndarray:
    """The values `[n, k]` of some channels of every token."""
    if isinstance(tokens, Tensor):
        return to_numpy(tokens.gather(1, torch.from_numpy(channels).long().to(tokens.device)))
    return np.take_along_axis(tokens, channels, axis=1)


def gram_experts(problem: ExpertProblem, assigned: np.ndarray, em_steps: int) -> tuple[list[Matrix], np.ndarray]:
    """Experts that are optimal for their own tokens, polished by EM (6.2, 6.3).

    Returns:
        Directions `[side, rank]` of every expert, and the final assignment `[sample]`.

    Example:
        >>> from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
        >>> tokens = torch.tensor([[5.0, 0.0], [0.0, 7.0]]).repeat(10, 1)
        >>> measured = collect_statistics("mlp", torch.ones(2, 2), tokens, StatisticsRequest(), seed=0)
        >>> sizes = {"experts": 2, "rank": 1, "rho": 0.05}
        >>> problem = ExpertProblem(np.eye(2), measured, np.arange(2), np.arange(2), np.ones(2), **sizes)
        >>> directions, assigned = gram_experts(problem, np.array([0, 1] * 10), em_steps=2)
        >>> [np.abs(direction).round(3).ravel().tolist() for direction in directions]
        [[1.0, 0.0], [0.0, 1.0]]
    """
    space = ErrorSpace.of(problem.error)
    outputs = problem.outputs
    if outputs is None:
        outputs = space.outputs(cast(problem.statistics.tokens, problem.error))
    everyone, gram = problem.covariance, problem.statistics.gram
    if everyone is None:
        everyone = outputs.T @ outputs / max(len(outputs), 1) if gram is None else space.covariance(gram)
    everyone = cast(everyone, outputs)
    energy = energies(outputs)[:, None]
    fit: _Fit = _fit_at_once if isinstance(outputs, Tensor) else _fit
    assigned = beside(assigned, outputs)
    directions = fit(outputs, assigned, everyone, problem, None)
    previous = np.inf
    for _ in range(em_steps):
        residual = residual_energy(outputs, directions, energy)
        total = float(double(_least(residual)).sum())
        if previous - total < EM_GAIN * previous and np.isfinite(previous):
            break
        previous, assigned = total, residual.argmin(1)
        directions = fit(outputs, assigned, everyone, problem, directions)
    return [space.lift(direction) for direction in directions], to_numpy(assigned)


_Fit = Callable[[Matrix, Matrix, Matrix, ExpertProblem, Any], Any]


def _least(residual: Matrix) -> Matrix:
    """The smallest entry of every row."""
    return residual.amin(1) if isinstance(residual, Tensor) else residual.min(1)


def residual_energy(outputs: Matrix, directions: Sequence[Matrix] | Tensor, energy: Matrix | None = None) -> Matrix:
    """`||(I - U_i U_i^T) z_t||^2` for every token and expert, `[tokens, experts]`; `energy` is `||z_t||^2` if known.

    Example:
        >>> outputs = np.array([[3.0, 4.0], [1.0, 0.0]])
        >>> residual_energy(outputs, [np.array([[1.0], [0.0]]), np.array([[0.0], [1.0]])])
        array([[16.,  9.],
               [ 0.,  1.]])
    """
    if isinstance(directions, Tensor):
        explained = (outputs @ cast(directions, outputs)).square_().sum(2).T
        return ((energies(outputs)[:, None] if energy is None else energy) - explained).clamp_min_(0.0)
    if energy is None:
        energy = np.square(outputs).sum(1, keepdims=True)
    explained = [np.square(outputs @ direction.astype(outputs.dtype)).sum(1) for direction in directions]
    residual: np.ndarray = np.maximum(energy - np.stack(explained, axis=1), 0.0)
    return residual


def _fit(
    outputs: np.ndarray,
    assigned: np.ndarray,
    everyone: np.ndarray,
    problem: ExpertProblem,
    previous: list[np.ndarray] | None,
) -> list[np.ndarray]:
    """Top directions of every expert's own covariance, mixed with the global one; empty ones take global directions."""

    def fit(expert: int) -> np.ndarray:
        own = outputs[assigned == expert]
        start, steps = (previous[expert], WARM_STEPS) if previous else (spare, KRYLOV_STEPS)
        if len(own) == 0:
            return leading_directions(everyone, start, problem.rank, steps)
        rho = FEW_TOKENS_SHARE if len(own) < FEW_TOKENS * problem.rank and problem.rho > 0 else problem.rho
        return leading_directions(mixed_covariance(own, everyone, rho), start, problem.rank, steps)

    with one_lapack_thread():
        nothing = np.zeros((len(everyone), 0))
        spare = nothing if previous else leading_directions(everyone, nothing, problem.rank)
        return map_threads(fit, range(problem.experts))


def _fit_at_once(
    outputs: Tensor, assigned: Tensor, everyone: Tensor, problem: ExpertProblem, previous: Tensor | None
) -> Tensor:
    """`_fit` on a device, of all experts at once: `[experts, side, rank]`. No number of tokens leaves the device."""
    own = (assigned == torch.arange(problem.experts, device=outputs.device)[:, None]).to(outputs.dtype)
    counts = own.sum(1)
    rho = torch.full_like(counts, problem.rho)
    if problem.rho > 0:
        rho[counts < FEW_TOKENS * problem.rank] = FEW_TOKENS_SHARE
    rho[counts == 0] = 1.0
    shares = (own * ((1 - rho) / counts.clamp_min(1))[:, None])[:, :, None]

    def multiply(block: Tensor) -> Tensor:
        return outputs.T @ ((outputs @ block) * shares) + rho[:, None, None] * (everyone @ block)

    if previous is None:
        previous, steps = top_eigenvectors(everyone, problem.rank).expand(problem.experts, -1, -1), KRYLOV_STEPS
    else:
        steps = WARM_STEPS
    return krylov_directions(
        multiply, filled(cast(previous, outputs), problem.rank + KRYLOV_EXTRA), problem.rank, steps
    )


def mixed_covariance(own: np.ndarray, everyone: np.ndarray, rho: float) -> np.ndarray | LinearOperator:
    """Covariance of an expert's outputs, mixed with the covariance of all tokens. A large one is never formed.

    Args:
        own: `[n, side]`, the expert's outputs.
        everyone: `[side, side]`, covariance over all tokens.
        rho: Share of `everyone`.

    Example:
        >>> own, everyone = np.array([[2.0, 0.0], [2.0, 0.0]]), np.eye(2)
        >>> mixed_covariance(own, everyone, rho=0.5)
        array([[2.5, 0. ],
               [0. , 0.5]])
    """
    share, rest = everyone.dtype.type((1 - rho) / len(own)), everyone.dtype.type(rho)
    if len(everyone) > EXACT_SIDE:
        outputs = aslinearoperator(own)
        return share * (outputs.T @ outputs) + rest * aslinearoperator(everyone)
    covariance = own.T @ own
    covariance *= share
    covariance += rest * everyone
    return covariance


def diagonal_experts(problem: ExpertProblem, assigned: np.ndarray, weighting: str) -> list[Matrix]:
    """The diagonal weightings that the paper's words "weighted SVD" allow (6.2), kept for ablation.

    `conditional_mean` weighs channels by their mean over the expert's tokens; `omega` by their mean relative to the
    smallest of the cluster; `lqer_omega` by the global mean, conditional on importance inside the cluster; `mask` by
    the mean on the cluster and zero elsewhere.

    Example:
        >>> from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
        >>> tokens = torch.tensor([[5.0, 0.1], [0.1, 7.0]]).repeat(10, 1)
        >>> measured = collect_statistics("mlp", torch.ones(2, 2), tokens, StatisticsRequest(), seed=0)
        >>> sizes = {"experts": 2, "rank": 1, "rho": 0.05}
        >>> problem = ExpertProblem(np.eye(2), measured, np.arange(2), np.arange(2), np.ones(2), **sizes)
        >>> directions = diagonal_experts(problem, np.array([0, 1] * 10), "conditional_mean")
        >>> [np.abs(direction).round(3).ravel().tolist() for direction in directions]
        [[1.0, 0.0], [0.0, 1.0]]
    """
    error, statistics = problem.error, problem.statistics
    if isinstance(error, Tensor):  # an ablation, which is not worth a way of its own on a device
        error, statistics = to_numpy(error), replace(statistics, tokens=to_numpy(statistics.tokens))
    mean = np.maximum(statistics.abs_mean, 1e-8)
    directions = []
    for expert in range(problem.experts):
        channels = problem.channels[problem.labels == expert]
        own = statistics.tokens[assigned == expert]
        if weighting == "conditional_mean":
            weights = np.maximum(np.abs(own).mean(0), 1e-8) if len(own) else mean
        elif weighting == "mask":
            weights = np.zeros_like(mean)
            weights[channels] = mean[channels]
        elif weighting == "omega":
            weights = np.ones_like(mean)
            weights[channels] = mean[channels] / mean[channels].min(initial=np.inf)
        else:
            weights = mean.copy()
            weights[channels] = _mean_where_important(statistics, channels, mean)
        directions.append(beside(diagonal_directions(error, weights, problem.rank), problem.error))
    return directions


def _mean_where_important(statistics: InputStatistics, channels: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Mean |x_c| over the sampled tokens that list channel c as important; the global mean where none does."""
    values: np.ndarray = mean[channels]
    if statistics.importance is None:
        return values
    lists = statistics.importance
    for slot, channel in enumerate(channels):
        rows = (lists == channel).any(1)
        if rows.any():
            values[slot] = max(float(np.abs(statistics.tokens[rows, channel]).mean()), 1e-8)
    return values
