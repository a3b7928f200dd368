"""The error that a low-rank correction of every size would leave, measured before a size is chosen.

Static corrections of all ranks come from one eigenproblem: rank r leaves the sum of the eigenvalues beyond the r-th.
Routed corrections are tried. Experts and router are fitted on the first half of the sampled tokens and judged on the
second half, in the space of the leading eigenvectors. They are compared with the static correction of the rank that one
token uses. The halves come from different samples: the tokens of one picture are so alike that an expert fitted on some
of them would do well on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qe_edge.calibration.clustering import npmi, occurrence_matrix, spectral_clusters
from qe_edge.calibration.importance import split_channels
from qe_edge.calibration.statistics import InputStatistics
from qe_edge.numerics.matrices import Matrix, beside, cast, double, energies, to_numpy
from qe_edge.reconstruction.directions import ErrorSpace, top_eigenvectors
from qe_edge.reconstruction.experts import ExpertProblem, assign_by_mass, residual_energy
from qe_edge.reconstruction.router import RidgeRegression
from qe_edge.reconstruction.shares import TRIAL_SHARE

TRIAL_TOKENS = 4096  # sampled tokens of a trial, half to fit and half to judge
TRIAL_ROUNDS = 3  # of assignment and fit
BEST_OF_SEVERAL = 1.02  # raises a routed trial's error, because the best of several trials is partly the luckiest


@dataclass(frozen=True)
class ErrorSpectrum:
    """An error's output energy by direction.

    Attributes:
        space: The error in coordinates of its smaller side.
        vectors: `[side, k]` leading directions in these coordinates.
        captured: `[k + 1]` energy per token that the first 0, 1, ... k directions capture.
        total: Energy per token of all directions.

    Example:
        >>> spectrum = ErrorSpectrum.of(np.diag([2.0, 1.0, 0.5]), np.eye(3), rank=2)
        >>> [round(spectrum.left(rank), 2) for rank in range(3)]
        [5.25, 1.25, 0.25]
    """

    space: ErrorSpace
    vectors: Matrix
    captured: np.ndarray
    total: float

    @classmethod
    def of(cls, error: Matrix, gram: Matrix, rank: int) -> ErrorSpectrum:
        """Spectrum of `error` `[out, in]` under `gram` `[in, in]`, with the leading `rank` directions."""
        space = ErrorSpace.of(error)
        covariance = space.covariance(gram)
        vectors = top_eigenvectors(covariance, rank)
        product = covariance @ cast(vectors, covariance)
        if isinstance(product, Tensor):
            energy = to_numpy((vectors * product).sum(0))
        else:
            energy = np.einsum("ij,ij->j", vectors, product)
        captured = np.concatenate(([0.0], np.cumsum(np.maximum(energy, 0.0))))
        return cls(space, vectors, captured, max(float(double(covariance.diagonal()).sum()), float(captured[-1])))

    @property
    def largest_rank(self) -> int:
        """Rank up to which losses are known."""
        return int(self.vectors.shape[1])

    def left(self, rank: int) -> float:
        """Energy per token that the optimal static correction of this rank leaves."""
        return self.total - float(self.captured[rank])


@dataclass(frozen=True)
class RoutedDesign:
    """Sizes of a correction with routed experts.

    Attributes:
        shared: Rank for all tokens.
        routed: Rank of every expert.
        experts: Their number.
    """

    shared: int
    routed: int
    experts: int


def routed_losses(
    spectrum: ErrorSpectrum,
    statistics: InputStatistics,
    channel_weight: np.ndarray,
    important: int,
    designs: Sequence[RoutedDesign],
    seed: int,
) -> list[float]:
    """Energy per token that every design leaves.

    Args:
        spectrum: Spectrum of the error. A design whose shared and routed rank exceed it is not tried (infinity).
        statistics: Statistics of the layer's input, with tokens and top-k lists.
        channel_weight: `[in]` mean |W|.
        important: k, channels per token-independent set.
        designs: Sizes to try.
        seed: Seed of the clustering.

    Example:
        >>> import torch
        >>> from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
        >>> _ = torch.manual_seed(0)
        >>> tokens, error = torch.randn(400, 16), np.random.default_rng(0).standard_normal((8, 16))
        >>> tokens[::2, :8], tokens[1::2, 8:] = 0, 0  # two kinds of tokens, each with channels of its own
        >>> measured = collect_statistics("mlp", torch.ones(8, 16), tokens, StatisticsRequest(important=4), seed=0)
        >>> spectrum = ErrorSpectrum.of(error, measured.gram, rank=8)
        >>> (routed,) = routed_losses(spectrum, measured, np.ones(16), 4, [RoutedDesign(0, 4, 2)], seed=0)
        >>> routed < spectrum.left(4)  # two experts of rank 4 leave less than one static correction of rank 4
        True
    """
    if statistics.importance is None or len(statistics.tokens) < 2:
        return [np.inf] * len(designs)
    rows = slice(None, None, max(1, len(statistics.tokens) // TRIAL_TOKENS))
    tokens = statistics.tokens[rows]
    outputs = double(spectrum.space.outputs(tokens))
    coordinates = outputs @ spectrum.vectors
    # a trial's own matrices are so small that a device would only wait for their next step
    leading = to_numpy(coordinates)
    beyond = to_numpy((energies(outputs) - energies(coordinates)).clip(0.0))
    half = len(tokens) // 2
    regression, magnitude, judged = RidgeRegression(tokens[:half]), abs(tokens[half:]), slice(half, None)

    def route(residuals: np.ndarray) -> np.ndarray:
        router = regression.router(beside(residuals, magnitude))
        return to_numpy((magnitude @ cast(router.T, magnitude)).argmin(1))

    starts: dict[int, np.ndarray] = {}
    losses = []
    for design in designs:
        active = design.shared + design.routed
        if active > spectrum.largest_rank:
            losses.append(np.inf)
            continue
        if design.experts not in starts:
            starts[design.experts] = _start(statistics, channel_weight, important, design.experts, seed)[rows]
        static = np.square(leading[judged, active:]).sum(1).mean() + beyond[judged].mean()
        chosen = _trial(leading[:, design.shared :], route, starts[design.experts], design)
        routed = BEST_OF_SEVERAL * (chosen.mean() + beyond[judged].mean())
        losses.append(spectrum.left(active) * float(routed / static) if static > 0 else 0.0)
    return losses


def _start(
    statistics: InputStatistics, channel_weight: np.ndarray, important: int, experts: int, seed: int
) -> np.ndarray:
    """Expert of every sampled token by co-occurrence of important channels; -1 where there is none."""
    lists = statistics.importance
    if lists is None:
        raise ValueError("the statistics hold no important channels")
    in_features = statistics.tokens.shape[1]
    split = split_channels(lists, in_features, min(important, in_features // (experts + 1)), experts)
    if len(split.dependent) < experts:
        return np.full(len(statistics.tokens), -1)
    labels = spectral_clusters(npmi(occurrence_matrix(lists, split.dependent, in_features)), experts, seed)
    nothing = np.zeros((0, in_features))
    return assign_by_mass(
        ExpertProblem(nothing, statistics, split.dependent, labels, channel_weight, experts, rank=0, rho=0.0)
    )


def _trial(
    outputs: np.ndarray, route: Callable[[np.ndarray], np.ndarray], start: np.ndarray, design: RoutedDesign
) -> np.ndarray:
    """Residual energy `[n / 2]` of the judged tokens, each with the expert that the router picks.

    Args:
        outputs: `[n, k]` of all tokens; the first half is fitted to, the others are judged.
        route: Expert of every judged token, by a router for the norms of the residuals on the first half.
        start: `[n]` first expert of every token.
        design: Sizes.
    """
    half = len(outputs) // 2
    fit, assigned = outputs[:half], start[:half]
    everyone = fit.T @ fit / len(fit)
    directions: list[np.ndarray] = []
    for _ in range(TRIAL_ROUNDS):
        directions = []
        for expert in range(design.experts):
            own = fit[assigned == expert]
            covariance = (
                (1.0 - TRIAL_SHARE) * (own.T @ own) / len(own) + TRIAL_SHARE * everyone if len(own) else everyone
            )
            directions.append(top_eigenvectors(covariance, design.routed))
        residual = residual_energy(fit, directions)
        assigned = residual.argmin(1)
    experts = route(np.sqrt(residual_energy(fit, directions)))
    judged = residual_energy(outputs[half:], directions)
    chosen: np.ndarray = judged[np.arange(len(judged)), experts]
    return chosen
