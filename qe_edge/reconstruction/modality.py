"""First assignment of tokens to routed experts by the kind of token: image, reference answer, or other text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qe_edge.calibration.clustering import npmi, occurrence_matrix, spectral_clusters
from qe_edge.calibration.importance import split_channels
from qe_edge.calibration.sensitivity import ANSWER
from qe_edge.numerics.matrices import picked
from qe_edge.reconstruction.experts import ExpertProblem, assign_by_mass

OTHER = 0


def assign_by_modality(problem: ExpertProblem, seed: int) -> np.ndarray:
    """Expert `[sample]` of every sampled token; -1 for none.

    Every kind of token that occurs gets at least one expert, and more in proportion to its tokens. If there are fewer
    experts than kinds, answers count as text. Inside a kind with several experts, tokens are grouped as in the paper:
    by the co-occurrence of channels that are important to some tokens of this kind.

    A layer that sees one kind only, or whose tokens have no kind, groups all its tokens by co-occurrence
    (`assign_by_mass`), as without this option.

    Args:
        problem: The problem, with clusters of the channels for layers that see one kind.
        seed: Seed of the clustering.

    Example:
        >>> import torch
        >>> from qe_edge.calibration.statistics import StatisticsCollector, StatisticsRequest
        >>> collector = StatisticsCollector("mlp", 4, [torch.ones(2, 4)], StatisticsRequest(important=1), seed=0)
        >>> collector.update(torch.ones(5, 4), torch.tensor([1, 1, 1, 2, 0], dtype=torch.int8))
        >>> (measured,) = collector.finish()
        >>> sizes = {"experts": 3, "rank": 1, "rho": 0.0}
        >>> problem = ExpertProblem(np.zeros((2, 4)), measured, np.arange(4), np.arange(4), np.ones(4), **sizes)
        >>> assign_by_modality(problem, seed=0)  # other text, image and answer tokens
        array([1, 1, 1, 2, 0])
    """
    statistics = problem.statistics
    kinds = statistics.token_kind
    if len(kinds) != len(statistics.tokens) or len(np.unique(kinds)) < 2:
        return assign_by_mass(problem)
    if len(np.unique(kinds)) > problem.experts:
        kinds = np.where(kinds == ANSWER, OTHER, kinds)
    present, counts = np.unique(kinds, return_counts=True)
    if len(present) < 2:
        return assign_by_mass(problem)
    assigned = np.full(len(kinds), -1)
    first = 0
    for kind, experts in zip(present, share_experts(counts, problem.experts), strict=True):
        rows = np.flatnonzero(kinds == kind)
        assigned[rows] = first + _inside(problem, rows, experts, seed)
        first += experts
    return assigned


def share_experts(counts: Sequence[int] | np.ndarray, experts: int) -> list[int]:
    """Experts of every kind: one each, and each further one to the kind with most tokens per expert.

    Args:
        counts: Tokens of every kind.
        experts: At least one per kind.

    Example:
        >>> share_experts([900, 100, 50], experts=5)
        [3, 1, 1]
    """
    shares = [1] * len(counts)
    for _ in range(experts - len(shares)):
        shares[max(range(len(shares)), key=lambda kind: counts[kind] / shares[kind])] += 1
    return shares


def _inside(problem: ExpertProblem, rows: np.ndarray, experts: int, seed: int) -> np.ndarray:
    """Expert `[len(rows)]` of every sampled token in `rows`; 0 for a token without important channels."""
    statistics, in_features = problem.statistics, problem.statistics.tokens.shape[1]
    if experts == 1 or statistics.importance is None:
        return np.zeros(len(rows), np.int64)
    lists = statistics.importance[rows]
    channels = split_channels(lists, in_features, lists.shape[1], experts).dependent
    own = replace(
        problem,
        statistics=replace(statistics, tokens=picked(statistics.tokens, rows), importance=lists),
        channels=channels,
        labels=spectral_clusters(npmi(occurrence_matrix(lists, channels, in_features)), experts, seed),
        experts=experts,
    )
    inside: np.ndarray = np.maximum(assign_by_mass(own), 0)
    return inside
