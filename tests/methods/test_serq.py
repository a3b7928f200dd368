"""SERQ gives the channels whose rounding costs most their error back, and nothing to the others."""

from __future__ import annotations

import numpy as np
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.methods.serq import salient_channels
from tests.layers import typed_layer


def test_the_matrix_is_the_error_of_the_costliest_channels() -> None:
    weight, x = typed_layer(48, 64, 500)
    options = {"adapter_dtype": "float32", "shrink": False, "rank": 12}
    layer = quantize_linear(weight, x, make_recipe(method="serq", scheme="w4a8", options=options))
    down, up, inverse = layer.down_matrix(), layer.up_matrix(), layer.inv_omega
    assert down is not None
    assert up is not None
    assert inverse is not None
    error = (weight - layer.decoded_weight() * inverse.float()).double().numpy()
    cost = [float((x[:, c].double() ** 2).mean()) * float(np.square(error[:, c]).sum()) for c in range(64)]
    chosen = sorted(np.argsort(cost)[-12:])
    assert (up @ down).nonzero()[:, 1].unique().tolist() == chosen
    np.testing.assert_allclose((up @ down).numpy()[:, chosen], error[:, chosen], atol=1e-6)
    # without activation rounding the other channels' error is all that is left
    layer.activation_bits = 0
    others = np.delete(np.arange(64), chosen)
    np.testing.assert_allclose(
        (x @ weight.T - layer(x)).numpy(), x.double().numpy()[:, others] @ error[:, others].T, atol=1e-3
    )


def test_channels_without_input_are_not_salient() -> None:
    error = np.ones((3, 5))
    assert salient_channels(error, np.array([0.0, 3.0, 1.0, 0.0, 2.0]), 4).tolist() == [1, 2, 4]
    weight, x = typed_layer(48, 64, 500)
    recipes = [make_recipe(method=method, scheme="w4a6") for method in ("serq", "smoothquant")]
    own, plain = (quantize_linear(weight, x, recipe) for recipe in recipes)
    assert torch.linalg.norm(own(x) - x @ weight.T) < 0.9 * torch.linalg.norm(plain(x) - x @ weight.T)
