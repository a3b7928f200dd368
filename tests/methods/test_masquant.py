"""MASQuant against its reference, and what a scale for every modality is good for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge import QELinear, make_recipe, quantize_linear
from qe_edge.methods.masquant import MASQuant, MASQuantOptions, image_direction
from qe_edge.methods.smoothquant import SmoothQuant
from tests.layers import problem_of, two_modalities
from tests.reference.masquant import masquant


def layer_of(method: MASQuant | SmoothQuant, scheme: str, weight: Tensor, x: Tensor, image: Tensor) -> QELinear:
    return QELinear(method.quantize(problem_of(method, scheme, weight, x, image)))


def test_it_equals_the_reference() -> None:
    weight, x, image = two_modalities(40, 64, 600)
    options = MASQuantOptions(steps=0, rank=12, shrink=False)
    layer = layer_of(MASQuant(options), "w4a8", weight, x, image)
    expected = masquant(weight.double().numpy(), x.double().numpy(), image.numpy(), 0.5, (4, 8), 12)
    target = (x @ weight.T).double().numpy()
    for mask in (image.numpy(), ~image.numpy()):
        lost = np.linalg.norm((expected - target)[mask])
        # a half-way point may fall on either side, and the pair is stored in float16
        assert np.linalg.norm((layer(x).double().numpy() - expected)[mask]) < 0.05 * lost


@pytest.mark.parametrize("scheme", ["w4a8", "w4a6"])
def test_a_scale_for_every_modality_beats_one_for_both(scheme: str) -> None:
    weight, x, image = two_modalities(96, 128, 1500)
    own, shared = (
        layer_of(method, scheme, weight, x, image)
        for method in (MASQuant(MASQuantOptions(shrink=False)), SmoothQuant(SmoothQuant.Options()))
    )
    for tokens in (x[image], x[~image]):
        lost = [(layer(tokens) - tokens @ weight.T).norm() for layer in (own, shared)]
        assert lost[0] < 0.85 * lost[1]


def test_learning_lowers_the_error_and_the_pair_makes_up_for_the_shared_codes() -> None:
    weight, x, image = two_modalities(48, 64, 800)
    lost = {}
    for name, options in (("all", {}), ("formula", {"steps": 0}), ("no pair", {"rank": 0})):
        layer = layer_of(MASQuant(MASQuantOptions(**options)), "w4a6", weight, x, image)
        lost[name] = [float((layer(x) - x @ weight.T)[mask].norm()) for mask in (image, ~image)]
    assert lost["all"][1] < 0.95 * lost["formula"][1]
    assert lost["all"][0] < 0.3 * lost["no pair"][0]


def test_one_modality_is_a_layer_that_can_be_exported() -> None:
    weight, x, image = two_modalities(48, 64, 300)
    for mask in (image, ~image):
        method = MASQuant(MASQuantOptions())
        assert method.quantize(problem_of(method, "w4a8", weight, x[mask], image[mask])).parts is None
    layer = quantize_linear(weight, x, make_recipe(method="masquant", scheme="w4a6"))
    plain = quantize_linear(weight, x, make_recipe(method="smoothquant", scheme="w4a6"))
    assert layer.parts is None
    assert (layer(x) - x @ weight.T).abs().mean() < (plain(x) - x @ weight.T).abs().mean()


def test_siblings_recognise_image_tokens_alike() -> None:
    weight, x, image = two_modalities(48, 64, 400)
    method = MASQuant(MASQuantOptions())
    whole = method.quantize(problem_of(method, "w4a8", weight, x, image))
    parts = [QELinear(part) for part in whole.split([32, 16])]
    assert torch.equal(torch.cat([part(x) for part in parts], 1), QELinear(whole)(x))
    direction = image_direction(x, image)
    assert ((x.abs() @ direction.float() > 0) == image).float().mean() > 0.99
