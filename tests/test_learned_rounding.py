"""LSQ against hand-written gradients, sign-gradient rounding against its bounds, and what both must gain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.methods.autoround import learn_rounding, rounded
from qe_edge.methods.lsq import LSQOptions, first_steps, learn_steps, stored
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid
from qe_edge.reconstruction.ranges import Ranges, row_losses
from tests.layers import correlated_layer
from tests.reference.lsq import lsq


def normed_gram(x: torch.Tensor) -> torch.Tensor:
    gram = x.double().T @ x.double() / len(x)
    return gram / gram.diagonal().mean()


@pytest.mark.parametrize("bits", [3, 4])
def test_lsq_equals_the_reference(bits: int) -> None:
    weight, x = correlated_layer(24, 48, 400)
    gram, grid, options = normed_gram(x), WeightGrid(bits, PER_CHANNEL, symmetric=True), LSQOptions(steps=40)
    steps, zeros = first_steps(weight, grid)
    codes = stored(*learn_steps(weight, steps, zeros, grid, gram.float(), options), zeros, grid)
    energy = row_losses(weight.double(), gram)
    found = (row_losses((codes.decode() - weight).double(), gram) / energy).numpy()
    decoded, expected = lsq(weight.double().numpy(), gram.numpy(), bits, 40, 0.02)
    # float32 may round one weight elsewhere, and the paths part a little from there on
    assert found.sum() == pytest.approx(expected.sum(), rel=0.02)
    assert np.mean(np.abs(codes.decode().numpy() - decoded) > 0.5 * steps.numpy()) < 0.02


@pytest.mark.parametrize("method", ["lsq", "autoround"])
@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
def test_learning_beats_rounding_and_repeats(method: str, scheme: str) -> None:
    weight, x = correlated_layer(48, 128, 700)
    weight[:, 7] = 0
    recipes = [make_recipe(method=name, scheme=scheme) for name in (method, method, "rtn")]
    one, two, plain = (quantize_linear(weight, x, recipe) for recipe in recipes)
    assert torch.equal(one.qweight, two.qweight)
    target, scale = x @ weight.T, one.scales
    assert scale.isfinite().all()
    for layer in (one, plain):
        layer.activation_bits = 0
    losses = [(layer(x) - target).square().sum(0) for layer in (one, plain)]
    assert losses[0].sum() < 0.3 * losses[1].sum()
    assert (losses[0] <= losses[1] * (1 + 1e-4)).all()


def test_sign_gradients_move_every_code_by_one_step_at_most() -> None:
    weight, x = correlated_layer(16, 64, 400)
    grid = WeightGrid(4, 32, symmetric=False)
    ranges = Ranges.of(weight, grid)
    shares, offset = learn_rounding(ranges, normed_gram(x).float(), 50, 0.02)
    assert offset.abs().max() <= 0.5
    assert 0.1 <= shares.min() < shares.max() <= 1
    moved, nearest = rounded(ranges, shares, offset), rounded(ranges, shares, torch.zeros_like(offset))
    difference = (moved.codes.int() - nearest.codes.int()).abs()
    assert difference.max() == 1
    assert 0.05 < difference.float().mean() < 0.6
    assert torch.equal(moved.scales, nearest.scales)
