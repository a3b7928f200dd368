"""First assignment of tokens to routed experts by what the tokens are: image, reference answer, or other text."""

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

    Experts are shared out among the kinds of tokens that occur, in proportion to their tokens and at least one each;
    where there are fewer experts than kinds, answers count as text. Inside a kind with several experts, tokens are told
    apart as in the paper: by the co-occurrence of channels that are important to some tokens of this kind.

    A layer that sees one kind only, or whose tokens have none, falls back to co-occurrence over all tokens
    (`assign_by_mass`), as without this option.

    Args:
        problem: With clusters of the channels for the fallback.
        seed: Of the clustering.
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
    """Experts of every kind: one each, and the rest one by one to where most tokens share an expert.

    Args:
        counts: Tokens of every kind.
        experts: At least one per kind.
    """
    shares = [1] * len(counts)
    for _ in range(experts - len(shares)):
        shares[max(range(len(shares)), key=lambda kind: counts[kind] / shares[kind])] += 1
    return shares


def _inside(problem: ExpertProblem, rows: np.ndarray, experts: int, seed: int) -> np.ndarray:
    """Expert `[len(rows)]` among `experts` of every sampled token in `rows`; those without important channels get 0."""
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
