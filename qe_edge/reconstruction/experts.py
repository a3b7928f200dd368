"""Routed experts: tokens that belong together and the low-rank correction of each group (docs/method.md, section 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from qe_edge.blas import one_lapack_thread, working_dtype
from qe_edge.calibration.statistics import InputStatistics
from qe_edge.parallel import map_threads
from qe_edge.reconstruction.directions import (
    EXACT_SIDE,
    KRYLOV_STEPS,
    WARM_STEPS,
    ErrorSpace,
    diagonal_directions,
    leading_directions,
)

WEIGHTINGS = ("gram", "condmean", "omega", "lqeromega", "mask")
FEW_TOKENS = 4  # times the expert's rank: fewer tokens than this lean on the global statistics
EM_GAIN = 1e-3  # relative gain below which the EM polish stops


@dataclass(frozen=True)
class ExpertProblem:
    """Everything the construction of routed experts reads.

    Attributes:
        error: `[side, in]`, what the shared expert left, in any orthonormal coordinates of the outputs.
        statistics: Calibration statistics of the input.
        channels: Token-dependent channels C_r.
        labels: Cluster of every entry of `channels`.
        channel_weight: `[in]` mean |W| per input channel.
        experts: Number of experts.
        rank: Rank of each.
        rho: Share of the global covariance mixed into every expert's own.
        outputs: `[sample, side]` the error's output on every sampled token, if it is known already.
        covariance: `[side, side]` the error's output covariance over all tokens, if it is known already.
    """

    error: np.ndarray
    statistics: InputStatistics
    channels: np.ndarray
    labels: np.ndarray
    channel_weight: np.ndarray
    experts: int
    rank: int
    rho: float
    outputs: np.ndarray | None = None
    covariance: np.ndarray | None = None


def assign_by_mass(problem: ExpertProblem) -> np.ndarray:
    """Cluster `[sample]` with the largest importance mass for every sampled token; -1 where there is none (6.1)."""
    statistics = problem.statistics
    tokens = statistics.tokens
    mass = np.zeros((len(tokens), problem.experts))
    if statistics.importance is not None:
        cluster = np.full(tokens.shape[1] + 1, -1)
        cluster[problem.channels] = problem.labels
        lists = statistics.importance
        owner = cluster[lists]
        values = np.abs(np.take_along_axis(tokens, np.maximum(lists, 0), axis=1)) * problem.channel_weight[lists]
        rows, slots = np.nonzero(owner >= 0)
        np.add.at(mass, (rows, owner[rows, slots]), values[rows, slots])
    assigned: np.ndarray = mass.argmax(1)
    assigned[mass.max(1) <= 0] = -1
    return assigned


def gram_experts(problem: ExpertProblem, assigned: np.ndarray, em_steps: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Experts that are optimal for their own tokens, polished by EM (6.2, 6.3).

    Returns:
        Directions `[side, rank]` of every expert, and the final assignment `[sample]`.
    """
    space = ErrorSpace.of(problem.error)
    outputs = problem.outputs
    if outputs is None:
        outputs = space.outputs(problem.statistics.tokens.astype(working_dtype(problem.error.size), copy=False))
    everyone, gram = problem.covariance, problem.statistics.gram
    if everyone is None:
        everyone = outputs.T @ outputs / max(len(outputs), 1) if gram is None else space.covariance(gram)
    everyone = everyone.astype(outputs.dtype, copy=False)
    energy = np.square(outputs).sum(1, keepdims=True)
    directions = _fit(outputs, assigned, everyone, problem, None)
    previous = np.inf
    for _ in range(em_steps):
        residual = residual_energy(outputs, directions, energy)
        total = float(residual.min(1).sum(dtype=np.float64))
        if previous - total < EM_GAIN * previous and np.isfinite(previous):
            break
        previous, assigned = total, residual.argmin(1)
        directions = _fit(outputs, assigned, everyone, problem, directions)
    return [space.lift(direction) for direction in directions], assigned


def residual_energy(outputs: np.ndarray, directions: list[np.ndarray], energy: np.ndarray | None = None) -> np.ndarray:
    """`||(I - U_i U_i^T) z_t||^2` for every token and expert, `[tokens, experts]`; `energy` is `||z_t||^2` if known."""
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
        rho = 0.5 if len(own) < FEW_TOKENS * problem.rank and problem.rho > 0 else problem.rho
        return leading_directions(mixed_covariance(own, everyone, rho), start, problem.rank, steps)

    with one_lapack_thread():
        nothing = np.zeros((len(everyone), 0))
        spare = nothing if previous else leading_directions(everyone, nothing, problem.rank)
        return map_threads(fit, range(problem.experts))


def mixed_covariance(own: np.ndarray, everyone: np.ndarray, rho: float) -> np.ndarray | LinearOperator:
    """Covariance of outputs `[n, side]`, mixed with the global one; a large one is multiplied with, but never formed.

    Args:
        own: An expert's outputs.
        everyone: `[side, side]`.
        rho: Share of the global one.
    """
    share, rest = everyone.dtype.type((1 - rho) / len(own)), everyone.dtype.type(rho)
    if len(everyone) > EXACT_SIDE:
        outputs = aslinearoperator(own)
        return share * (outputs.T @ outputs) + rest * aslinearoperator(everyone)
    covariance = own.T @ own
    covariance *= share
    covariance += rest * everyone
    return covariance


def diagonal_experts(problem: ExpertProblem, assigned: np.ndarray, weighting: str) -> list[np.ndarray]:
    """The paper-literal diagonal readings of "weighted SVD" (6.2), kept for ablation.

    `condmean` weighs channels by their mean over the expert's tokens; `omega` by their mean relative to the smallest
    of the cluster; `lqeromega` by the global mean, conditional on importance inside the cluster; `mask` by the mean on
    the cluster and zero elsewhere.
    """
    statistics = problem.statistics
    mean = np.maximum(statistics.abs_mean, 1e-8)
    directions = []
    for expert in range(problem.experts):
        channels = problem.channels[problem.labels == expert]
        own = statistics.tokens[assigned == expert]
        if weighting == "condmean":
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
        directions.append(diagonal_directions(problem.error, weights, problem.rank))
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
