"""Experts that start from what tokens are: how they are shared out, and that it pays where modalities differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge import make_recipe
from qe_edge.calibration.sensitivity import ANSWER, IMAGE
from qe_edge.calibration.statistics import InputStatistics, StatisticsCollector
from qe_edge.layers.linear import QELinear
from qe_edge.numerics.schemes import get_scheme
from qe_edge.reconstruction.experts import ExpertProblem, assign_by_mass
from qe_edge.reconstruction.modality import assign_by_modality, share_experts
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.errors import RecipeError
from tests.layers import outlier_layer

SIDE, CALIBRATION, HELD_OUT = 96, 2500, 1500


def layer_of_two_modalities(seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Weight, tokens and kinds: ten channels are large for image tokens and ten others for text."""
    weight, x, types = outlier_layer(SIDE, SIDE, CALIBRATION + HELD_OUT, types=6, strength=0.5, seed=seed)
    kinds = np.where(types % 2, IMAGE, 0).astype(np.int8)
    channels = np.random.default_rng(seed + 100).permutation(SIDE)
    for kind, chosen, factor in ((0, channels[:10], 6), (IMAGE, channels[10:20], 4)):
        x[np.ix_(np.flatnonzero(kinds == kind), chosen)] *= factor
    return weight, x, kinds


def quantized(weight: Tensor, x: Tensor, kinds: np.ndarray, **options: object) -> QELinear:
    method = make_recipe(
        method="qe",
        scheme="w4a8",
        options={
            "shared_rank": 8, "routed_rank": 8, "experts": 4, "important_channels": 8, "shrink": False,
            "guard_independent_channels": False, "rounding": "nearest", "clip": False, "adapter_dtype": "float16",
            **options,
        },
    ).build_method()  # fmt: skip
    request = method.request(*weight.shape)
    assert request is not None
    collector = StatisticsCollector("layer", weight.shape[1], [weight], request, 0)
    collector.update(x, torch.from_numpy(kinds))
    return QELinear(method.quantize(LinearProblem("layer", weight, get_scheme("w4a8"), collector.finish()[0], 0)))


def expert_problem(kinds: np.ndarray, experts: int) -> ExpertProblem:
    """Sixteen channels; a token is large in three channels that depend on its kind."""
    rng = np.random.default_rng(0)
    x = rng.random((len(kinds), 16)).astype(np.float32)
    for row, kind in enumerate(kinds):
        x[row, 4 * kind : 4 * kind + 3] += 5
    lists = np.argsort(-x, axis=1)[:, :3].astype(np.int32)
    statistics = InputStatistics(len(x), 0, np.abs(x).mean(0), np.abs(x).max(0), None, x, lists, kinds)
    channels = np.arange(16)
    return ExpertProblem(np.zeros((4, 16)), statistics, channels, channels % experts, np.ones(16), experts, 2, 0.0)


@pytest.mark.parametrize(
    ("counts", "experts", "expected"),
    [((10, 10), 8, [4, 4]), ((75, 25), 8, [6, 2]), ((998, 1, 1), 8, [6, 1, 1]), ((1, 1, 98), 3, [1, 1, 1])],
)
def test_experts_are_shared_in_proportion_with_one_each(
    counts: tuple[int, ...], experts: int, expected: list[int]
) -> None:
    assert share_experts(counts, experts) == expected


def test_kinds_share_no_expert() -> None:
    kinds = np.array([IMAGE] * 60 + [0] * 30 + [ANSWER] * 10, np.int8)
    assigned = assign_by_modality(expert_problem(kinds, 5), seed=0)
    groups = [set(assigned[kinds == kind].tolist()) for kind in (0, IMAGE, ANSWER)]
    assert assigned.min() >= 0
    assert set.union(*groups) <= set(range(5))
    assert sum(len(group) for group in groups) == len(set.union(*groups))
    assert groups[2] == {4}


def test_with_two_experts_answers_are_text() -> None:
    kinds = np.array([IMAGE] * 40 + [0] * 30 + [ANSWER] * 10, np.int8)
    assigned = assign_by_modality(expert_problem(kinds, 2), seed=0)
    np.testing.assert_array_equal(assigned, (kinds == IMAGE).astype(int))


@pytest.mark.parametrize("kinds", [np.full(80, IMAGE, np.int8), np.zeros(0, np.int8)], ids=["one kind", "unknown"])
def test_a_layer_without_two_kinds_falls_back_to_cooccurrence(kinds: np.ndarray) -> None:
    problem = expert_problem(np.full(80, IMAGE, np.int8), 4)
    problem = replace(problem, statistics=replace(problem.statistics, token_kind=kinds))
    np.testing.assert_array_equal(assign_by_modality(problem, seed=0), assign_by_mass(problem))
    weight, x, _ = layer_of_two_modalities(0)
    one = np.full(len(x), IMAGE, np.int8)
    first, second = (quantized(weight, x, one, assignment=name) for name in ("cooccurrence", "modality"))
    assert first.down is not None
    assert second.down is not None
    assert torch.equal(first.down, second.down)


@pytest.mark.parametrize("em_steps", [0, 3])
def test_modality_is_no_worse_on_held_out_tokens_where_modalities_have_their_own_channels(em_steps: int) -> None:
    errors = {}
    for assignment in ("cooccurrence", "modality"):
        found = []
        for seed in range(4):
            weight, x, kinds = layer_of_two_modalities(seed)
            layer = quantized(weight, x[:CALIBRATION], kinds[:CALIBRATION], assignment=assignment, em_steps=em_steps)
            wanted = x[CALIBRATION:] @ weight.T
            found.append(float((layer(x[CALIBRATION:]) - wanted).norm() / wanted.norm()))
        errors[assignment] = np.array(found)
    assert (errors["modality"] <= errors["cooccurrence"] * 1.005).all()
    assert errors["modality"].mean() < 0.99 * errors["cooccurrence"].mean()


def test_weightings_that_read_clusters_of_channels_are_refused() -> None:
    with pytest.raises(RecipeError, match="modality"):
        make_recipe(method="qe", options={"assignment": "modality", "expert_weighting": "omega"})
