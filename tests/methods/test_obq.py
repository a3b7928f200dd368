"""OBQ against the Hessian inverted anew for every weight, and what exact greedy rounding must gain."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.methods.obq import obq_round
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid
from qe_edge.system.errors import RecipeError
from tests.layers import correlated_layer
from tests.reference.obq import obq_row


@pytest.mark.parametrize(("group", "symmetric"), [(PER_CHANNEL, True), (16, False)])
def test_obq_equals_the_reference(group: int, symmetric: bool) -> None:
    weight, x = correlated_layer(12, 48, 300)
    gram = (x.double().T @ x.double() / len(x)).numpy()
    found = obq_round(weight, gram, WeightGrid(3, group, symmetric), 0.01, clip=True)
    hessian = gram + 0.01 * np.diag(gram).mean() * np.eye(48)
    width = 48 if group == PER_CHANNEL else group
    scale = np.repeat(found.scales.double().numpy(), width, 1)
    zero = np.zeros_like(scale) if found.zeros is None else np.repeat(found.zeros.double().numpy(), width, 1)
    for row, decoded in enumerate(found.decode().double().numpy()):
        expected = obq_row(weight[row].double().numpy(), hessian, scale[row], zero[row], (-4, 3))
        np.testing.assert_allclose(decoded, expected, atol=1e-6)


def test_correlated_inputs_make_up_for_most_of_the_error() -> None:
    weight, x = correlated_layer(48, 64, 600)
    weight[:, 9] = 2 * weight[:, 9].abs()
    x[:, 5] = 0
    recipes = [make_recipe(method=method, scheme="w3a16") for method in ("obq", "rtn")]
    layers = {recipe.method: quantize_linear(weight, x, recipe) for recipe in recipes}
    losses = {method: float((layer(x) - x @ weight.T).norm()) for method, layer in layers.items()}
    assert losses["obq"] < 0.6 * losses["rtn"]
    assert (layers["obq"].decoded_weight()[:, 5] == 0).all()


def test_large_layers_are_refused_before_anything_is_measured() -> None:
    tokens = torch.full((1, 4096), torch.nan)  # whoever measures them stumbles
    with pytest.raises(RecipeError, match=r"'linear' \[8, 4096\] is too large for OBQ.*gptq"):
        quantize_linear(torch.ones(8, 4096), tokens, make_recipe(method="obq"))
