"""Polishing never loses, and ends where no single code and no single scale can be changed for the better."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.numerics.grids import PER_CHANNEL, QuantizedWeight, WeightGrid
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.polishing import polished
from tests.layers import correlated_layer

GRIDS = [WeightGrid(4, PER_CHANNEL, symmetric=True), *(WeightGrid(bits, 32, symmetric=False) for bits in (2, 3))]


def problem() -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """A weight, its Gram matrix, and that with damping."""
    weight, x = correlated_layer(24, 160, 700)
    x[:, 5] = 0
    gram = (x.double().T @ x.double() / len(x)).numpy()
    return weight, gram, gram + 0.01 * np.diag(gram).mean() * np.eye(160)


def losses(codes: QuantizedWeight, weight: torch.Tensor, hessian: np.ndarray) -> np.ndarray:
    error = (codes.decode() - weight).double().numpy()
    return np.einsum("oi,ij,oj->o", error, hessian, error)


@pytest.mark.parametrize("grid", GRIDS)
def test_no_row_loses_and_the_whole_gains(grid: WeightGrid) -> None:
    weight, gram, damped = problem()
    weight[:, 5] = 0
    codes = gptq_round(weight, gram, grid, 0.01, clip=True)
    found = [losses(polished(codes, weight, gram, grid, 0.01, rounds), weight, damped) for rounds in (1, 4)]
    before = losses(codes, weight, damped)
    assert (found[0] <= before * (1 + 1e-5)).all()
    assert (found[1] <= found[0] * (1 + 1e-5)).all()
    assert found[1].sum() < 0.9 * before.sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_it_ends_where_no_code_can_be_bettered(grid: WeightGrid) -> None:
    weight, gram, damped = problem()
    weight[:, 5] = 0
    end = polished(gptq_round(weight, gram, grid, 0.01), weight, gram, grid, 0.01, 60)
    scale = (end.decode() - weight).double().numpy()
    step = end.scales.double().repeat_interleave(160 // end.scales.shape[1], 1).numpy()
    slope, curvature = 2 * scale @ damped, np.diag(damped)
    codes, (low, high) = end.codes.numpy(), grid.limits
    for sign in (-1, 1):
        allowed = (codes + sign >= low) & (codes + sign <= high)
        change = sign * step * slope + step**2 * curvature
        assert (change[allowed] > -1e-4 * (step**2 * curvature)[allowed]).all()


def test_inputs_that_are_always_zero_keep_their_zero_weights() -> None:
    weight, x = correlated_layer(16, 64, 300)
    x[:, 5] = 0
    options = {"polish": 3, "experts": 0, "shared_rank": 0, "important_channels": 0}
    layer = quantize_linear(weight, x, make_recipe(method="qe", scheme="w4a16", options=options))
    assert (layer.decoded_weight()[:, 5] == 0).all()
    plain = quantize_linear(weight, x, make_recipe(method="qe", scheme="w4a16", options={**options, "polish": 0}))
    assert (layer(x) - x @ weight.T).norm() < 0.97 * (plain(x) - x @ weight.T).norm()
